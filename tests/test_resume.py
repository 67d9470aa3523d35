"""A resumed run trains as the first one would have, unless other options are given."""

import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPools
from small_run import SMALL

from flash_moe_dist.checkpoint import Checkpointer

GIVEN = (
    *("--lr", "0.5", "--precision", "bfloat16", "--seed", "3", "--on-nonfinite", "skip"),
    *("--score-norm", "none", "--aux-loss-coef", "0.25", "--z-loss-coef", "0.125"),
    *("--bias-update-rate", "0.5", "--force-load-balance", "--table-lr-scale", "3"),
)


def prepared(argv: list[str], saved: dict[str, Any], world_size: int = 2) -> Any:
    """Options, data and model of a run of `argv`, as launch/train.py makes them."""
    from options import parse_args
    from resume import recall
    from train import prepare

    args = parse_args("", argv)
    if saved:
        recall(args, saved, world_size)
    runtime: Any = SimpleNamespace(world_size=world_size, device=torch.device("cpu"))
    corpus, config = prepare(args, runtime, saved)
    return SimpleNamespace(args=args, runtime=runtime, corpus=corpus, config=config)


def progress_of(run: Any) -> dict[str, Any]:
    from train import Run

    saved: dict[str, Any] = json.loads(json.dumps(Run.progress(run)))
    return saved


def changed(run: Any, saved: dict[str, Any]) -> list[str]:
    from resume import changes

    return list(changes(saved, progress_of(run)))


@pytest.fixture
def data(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data.txt"
    path.write_bytes(Path(text).read_bytes())
    return path


def test_options_are_those_of_the_start(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared([*SMALL, *GIVEN, "--ep-size", "1", "--data", data.name], {})
    saved = progress_of(first)
    # A relative path stays what it was.
    monkeypatch.chdir("/")
    again = prepared(["--resume"], saved)
    expected = vars(first.args) | {"data": data, "resume": True, "given": {"resume"}}
    assert vars(again.args) == expected
    assert again.config == first.config
    assert changed(again, saved) == []
    # As many sequences for each rank; experts over all of them.
    more = prepared(["--resume"], saved, world_size=5)
    assert (more.args.batch_size, more.args.ep_size) == (15, None)
    assert changed(more, saved) == [
        "changed: --ep-size 1 before, None now",
        "changed: batch_size 12 before, 15 now",
        "changed: world_size 2 before, 5 now",
    ]


def test_what_is_given_again_is_used_and_said(data: Path) -> None:
    saved = progress_of(prepared([*SMALL, *GIVEN, "--data", data.name], {}))
    other = data.with_name("other.txt")
    other.write_bytes(data.read_bytes()[:-40])
    argv = ["--resume", "--lr", "0.002", "--precision", "float32", "--data", "other.txt"]
    argv += ["--bias-update-rate", "0.25", "--no-force-load-balance"]
    again = prepared(argv, saved)
    assert (again.args.lr, again.args.precision, again.args.data) == (
        0.002,
        "float32",
        Path("other.txt"),
    )
    tokens = len(again.corpus.train)
    assert changed(again, saved) == [
        "changed: --lr 0.5 before, 0.002 now",
        "changed: --precision bfloat16 before, float32 now",
        "changed: --bias-update-rate 0.5 before, 0.25 now",
        "changed: --force-load-balance True before, False now",
        f"changed: data {data} before, {other} now",
        f"changed: training_tokens {saved['training_tokens']} before, {tokens} now",
    ]


def test_another_model_is_refused(data: Path) -> None:
    saved = progress_of(prepared([*SMALL, "--data", data.name], {}))
    message = "checkpoint in --out is of a model with num_experts = 50, here 60"
    with pytest.raises(ValueError, match=message):
        prepared(["--resume", "--num-experts", "60"], saved)


def test_other_data_must_be_asked_for(data: Path) -> None:
    saved = progress_of(prepared([*SMALL, "--data", data.name], {}))
    data.write_bytes(data.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"--data must be given to go on with .*: {data} has"):
        prepared(["--resume"], saved)
    assert len(changed(prepared(["--resume", "--data", data.name], saved), saved)) == 1
    data.unlink()
    with pytest.raises(ValueError, match=f"found nothing at {data}"):
        prepared(["--resume"], saved)


def test_progress_of_older_runs(data: Path) -> None:
    first = prepared([*SMALL, "--data", data.name, "--seed", "4"], {})
    saved = progress_of(first)
    del saved["options"]
    saved |= {"seed": 4, "seq_len": 16}
    again = prepared(["--resume"], saved)
    assert again.config == first.config
    assert (again.args.data, again.args.seed, again.args.seq_len) == (data, 4, 16)
    assert changed(again, saved) == []


def test_runs_from_before_there_were_options_of_routers(data: Path) -> None:
    saved = progress_of(prepared([*SMALL, "--data", data.name, "--lr", "0.5"], {}))
    routers = ("score_norm", "aux_loss_coef", "z_loss_coef", "bias_update_rate")
    for name in (*routers, "force_load_balance"):
        del saved["model"][name], saved["options"][name]
    del saved["options"]["table_lr_scale"], saved["options"]["table_optimizer"]
    again = prepared(["--resume"], saved)
    assert again.config.score_norm is None
    assert [getattr(again.args, name) for name in routers] == ["none", 0.0, 0.0, 0.0]
    assert (again.args.lr, again.args.table_lr_scale) == (0.5, 1.0)
    assert again.args.table_optimizer == "adamw"
    assert changed(again, saved) == []
    with pytest.raises(ValueError, match="a model with score_norm = None, here batch"):
        prepared(["--resume", "--score-norm", "batch"], saved)
    with pytest.raises(ValueError, match=r"a model with bias_update_rate = 0.0, here 0.1"):
        prepared(["--resume", "--bias-update-rate", "0.1"], saved)
    other = prepared(["--resume", "--aux-loss-coef", "0.5", "--table-lr-scale", "4"], saved)
    assert changed(other, saved) == [
        "changed: --table-lr-scale 1.0 before, 4.0 now",
        "changed: --aux-loss-coef 0.0 before, 0.5 now",
    ]


def test_optimizer_of_the_tables_unless_given(data: Path) -> None:
    for options, world_size, wanted, scale in (
        ((), 2, "rowwise-adagrad", 4.0),
        (("--ep-size", "1"), 2, "adamw", 1.0),
        (("--ep-size", "1"), 1, "rowwise-adagrad", 4.0),
        (("--table-optimizer", "lazy-adam"), 2, "lazy-adam", 1.0),
    ):
        given = ["--data", data.name, "--seq-len", "16", "--hidden-size", "512", *options]
        args = prepared(given, {}, world_size=world_size).args
        assert (args.table_optimizer, args.table_lr_scale) == (wanted, scale)


def test_tables_are_narrow_where_their_optimizer_keeps_the_missing_bits() -> None:
    from model import ModelConfig, Transformer
    from optimizer import build_optimizers, narrow_tables

    config = ModelConfig(10, 16, 16, 1, 2, 50, 4)
    for precision, name, dtype in (
        ("bfloat16", "rowwise-adagrad", torch.bfloat16),
        ("bfloat16", "adamw", torch.float32),
        ("float32", "rowwise-adagrad", torch.float32),
    ):
        model = Transformer(config)
        narrow_tables(model, precision, name)  # type: ignore[arg-type]
        parameters = dict(model.named_parameters())
        tables = [parameters[f"layers.0.moe.experts.{one}_weights"] for one in ("down", "up")]
        assert {table.dtype for table in tables} == {dtype}
        assert parameters["layers.0.moe.router.keys.weight"].dtype == torch.float32
        kinds = [type(one).__name__ for one in build_optimizers(model, 1.0, name)]  # type: ignore[arg-type]
        assert kinds == (["AdamW"] if name == "adamw" else ["AdamW", "RowwiseAdagrad"])


def test_learning_rate_falls_with_the_hidden_size_unless_recorded(data: Path) -> None:
    run = prepared(["--data", data.name, "--seq-len", "16", "--hidden-size", "1024"], {})
    assert run.args.lr == pytest.approx(2e-3 / 8**0.5)
    saved = progress_of(run)
    assert prepared(["--resume"], saved).args.lr == run.args.lr
    # As all runs did that recorded no options.
    del saved["options"]
    assert prepared(["--resume"], saved).args.lr == 2e-3


def test_the_standard_library_stays_without_installed_packages() -> None:
    from options import parse_args
    from resume import recall

    args = parse_args("", ["--resume"])
    recall(args, {"data": sysconfig.get_paths()["stdlib"]}, 2)
    assert args.data is None


def test_only_options_of_a_run_are_taken_over() -> None:
    from options import parse_args
    from resume import recall

    args = parse_args("", [])
    before = dict(vars(args))
    recall(args, {"options": {"out": "/elsewhere", "keep": 0, "timeout": 1e-9, "other": 1}}, 2)
    assert vars(args) == before
    with pytest.raises(ValueError, match="records 'x' for --steps, which must be of type int"):
        recall(args, {"options": {"steps": "x"}}, 2)


def resumed_without_checkpoint(data: str, out: str, given: list[str]) -> Any:
    """Options and progress of a run that is resumed before its first checkpoint."""
    from options import parse_args
    from resume import write_start
    from train import progress_to_resume

    first = prepared([*SMALL, *GIVEN, "--data", data], {})
    if dist.get_rank() == 0:
        write_start(Path(out), progress_of(first))
    checkpoints = Checkpointer(Path(out) / "checkpoints", 1)
    args = parse_args("", [*given, "--out", out])
    saved = progress_to_resume(args, checkpoints)
    names = ("data", "hidden_size", "lr", "precision")
    return saved, first.args, {name: getattr(args, name) for name in names}


def test_resumed_before_the_first_checkpoint(
    text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    for saved, first, taken in rank_pools.run(
        2, resumed_without_checkpoint, text, str(tmp_path), ["--resume", "--lr", "0.25"]
    ):
        assert saved["training_tokens"] > 0
        assert taken == {
            "data": Path(text),
            "hidden_size": first.hidden_size,
            "lr": 0.25,
            "precision": "bfloat16",
        }
    for saved, _, taken in rank_pools.run(2, resumed_without_checkpoint, text, str(tmp_path), []):
        assert saved == {}
        assert taken["data"] is None


def test_start_that_is_missing_or_damaged(tmp_path: Path) -> None:
    from resume import read_start

    assert read_start(tmp_path) == {}
    for content in ("[]", "{", "\x00"):
        (tmp_path / "start.json").write_text(content)
        with pytest.raises(ValueError, match="must be free of damaged files, got "):
            read_start(tmp_path)

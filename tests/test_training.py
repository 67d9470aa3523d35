"""The training script: equal training on any number of ranks, and invalid options."""

import inspect
import itertools
import json
import os
import re
import subprocess
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import RankPools
from sharded import whole, whole_parameters
from small_run import REPOSITORY, SMALL, STEPS, launch, small_run

TWO_GPUS = torch.cuda.device_count() == 2


def train_twenty_steps(data: str, ep_size: int | None = None) -> tuple[list[float], dict[str, Any]]:
    run = small_run(data, ep_size)
    losses = [run.step(step).loss for step in range(1, STEPS + 1)]
    return losses, whole_parameters(run.model)


def assert_same_training(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    losses, parameters = one
    other_losses, other_parameters = other
    assert losses == pytest.approx(other_losses, rel=tolerance)
    assert parameters.keys() == other_parameters.keys()
    for name, parameter in parameters.items():
        difference = (other_parameters[name] - parameter).norm() / parameter.norm()
        assert difference <= 1e-4, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize("world_size", [2, 3])
def test_same_losses_and_parameters_on_any_number_of_ranks(
    world_size: int, text: str, rank_pools: RankPools
) -> None:
    alone = rank_pools.run(1, train_twenty_steps, text)[0]
    assert alone[0][-1] < alone[0][0] - 0.3
    for rank_result in rank_pools.run(world_size, train_twenty_steps, text):
        assert_same_training(alone, rank_result)


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [1, 2])
def test_same_training_with_tables_cut_twice(
    ep_size: int, text: str, rank_pools: RankPools
) -> None:
    alone = rank_pools.run(1, train_twenty_steps, text)[0]
    for rank_result in rank_pools.run(4, train_twenty_steps, text, ep_size):
        assert_same_training(alone, rank_result)


@pytest.mark.gpu
def test_same_training_with_nccl(text: str, rank_pools: RankPools) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    alone = rank_pools.run(1, train_twenty_steps, text, backend="nccl")[0]
    for rank_result in rank_pools.run(2, train_twenty_steps, text, backend="nccl"):
        assert_same_training(alone, rank_result)


BAD_OPTIONS = {
    "unreadable data": (
        ["--data", "/nowhere/at/all"],
        "--data must name a file or a folder, found nothing at /nowhere/at/all",
    ),
    "hidden size that groups of ranks do not divide": (
        ["--ep-size", "1", "--hidden-size", "127"],
        "--hidden-size must be a multiple of the number of ranks over --ep-size = 2, got 127",
    ),
    "more experts for a token than there are": (
        ["--num-experts", "8", "--num-experts-per-tok", "9"],
        "--num-experts-per-tok must be at most --num-experts = 8, got 9",
    ),
    "heads that do not divide the hidden size": (
        ["--num-heads", "3"],
        "hidden_size must be an even multiple of num_heads = 3",
    ),
    "number of experts without a key grid": (
        ["--num-experts", "16381"],
        "num_experts must have two factors near each other, got 16381",
    ),
    "ranks that --ep-size does not divide": (
        ["--ep-size", "3"],
        "--ep-size must divide the number of ranks = 2, got 3",
    ),
    "token ids outside of the vocabulary": (
        ["--vocab-size", "100"],
        "--data must hold token ids below the model's vocabulary of 100, got ",
    ),
    "no steps": (["--steps", "0"], "--steps must be positive, got 0"),
    "learning rate is no number": (["--lr", "nan"], "--lr must be positive, got nan"),
    "negative coefficient": (
        ["--aux-loss-coef", "-0.1"],
        "--aux-loss-coef must not be negative, got -0.1",
    ),
    "norm of another kind": (["--score-norm", "layer"], "argument --score-norm: invalid choice"),
    "tables that do not learn": (
        ["--table-lr-scale", "0"],
        "--table-lr-scale must be positive, got 0.0",
    ),
    "table rows that several ranks hold": (
        ["--ep-size", "1", "--table-optimizer", "sgd"],
        "--table-optimizer must be adamw where --ep-size is less than the number of ranks = 2",
    ),
    "negative seed": (["--seed", "-1"], "--seed must not be negative, got -1"),
    "unknown option": (["--stepz", "1"], "unrecognized arguments: --stepz 1"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options: list[str], message: str, text: str) -> None:
    """Checked as launch/train.py does; the runs below show what becomes of the error."""
    from options import parse_args
    from train import prepare, runtime_for

    def check() -> None:
        args = parse_args("", ["--data", text, *options])
        device = torch.device("cpu")
        runtime: Any = SimpleNamespace(world_size=2, device=device, timeout=timedelta(1))
        prepare(args, runtime_for(args, runtime), {})

    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check()


# One that all ranks find, and one that only the first rank finds.
REFUSED = [
    (["--batch-size", "7"], "--batch-size must be a multiple of the number of ranks = 2, got 7\n"),
    (["--out", __file__], "rank 0: --out must be a writable folder, got [Errno 17] File exists"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=["every rank", "rank 0"])
def test_bad_options_end_every_rank_with_one_message(
    options: list[str], message: str, tmp_path: Path
) -> None:
    ended = launch("--out", str(tmp_path / "out"), *options)
    assert ended.returncode != 0
    assert ended.stderr.count(f"train.sh: error: {message}") == 1
    assert 'train.py", line' not in ended.stderr, "a traceback hides the message"
    assert not (tmp_path / "out").exists(), "a refused run leaves a folder"


def train_with_a_huge_learning_rate(data: str) -> None:
    from signals import StopSignals
    from train import train

    run = small_run(data, None, "--lr", "1e9", "--steps", "200")
    checkpoints: Any = None
    with StopSignals(100) as signals:
        train(run, 1, checkpoints, None, signals)


def test_loss_that_is_no_number_ends_the_run(text: str, rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, train_with_a_huge_learning_rate, text):
        assert re.match(
            r"(training loss is (nan|inf) on rank \d.*|gradient norm is (nan|inf)) "
            r"at step \d+: lower --lr",
            outcome.message,
        )
        assert outcome.kind == "RuntimeError"


@pytest.mark.slow
def test_a_run_of_any_number_of_ranks(text: str, tmp_path: Path) -> None:
    """In bfloat16, with shares of phases in a step, and a batch that the ranks divide.

    Ids that are no bytes, and the path, are printed where there is no UTF-8 too.
    """
    out = tmp_path / "\u00e9"
    small = [*SMALL, "--data", text, "--out", str(out), "--precision", "bfloat16"]
    small += ["--vocab-size", "300", "--time-phases"]
    del small[small.index("--batch-size") : small.index("--batch-size") + 2]
    small += ["--steps", "3", "--sample-tokens", "6"]
    ended = launch(*small, ranks=2 if TWO_GPUS else 3, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended.stderr
    assert "\\xe9" in ended.stdout.splitlines()[-1]
    assert "the summary failed" not in ended.stderr
    assert re.search(
        r"median of [\d,]+ tokens/s; phases of expert layers, of a step: "
        r"dispatch [\d.]+%, experts \d",
        ended.stdout,
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        shares = json.loads(line)["share_of_step"]
        assert {"dispatch", "experts", "combine", "communication"} < shares.keys()
        assert 0 < sum(shares.values()) < 1


def test_time_steps_is_a_deprecated_name_of_time_phases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from options import parse_args

    assert not parse_args("", []).time_phases
    assert parse_args("", ["--time-phases"]).time_phases
    assert capsys.readouterr().err == ""
    note = "train.sh: --time-steps is deprecated, use --time-phases\n"
    for rank, printed in (("0", note), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert parse_args("", ["--time-steps"]).time_phases
        assert capsys.readouterr().err == printed


def test_learning_rate_rises_then_falls() -> None:
    from optimizer import learning_rate_factor

    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert all(one > other for one, other in itertools.pairwise(factors[5:]))
    assert 0.1 < factors[-1] < 0.12


def test_defaults_are_those_of_the_layer() -> None:
    from flash_moe import FlashMoE
    from model import ModelConfig, Transformer
    from options import SCORE_NORMS, parse_args

    defaults, args = ModelConfig(30, 16, 16, 1, 2, 20, 3), parse_args("", [])
    for name, parameter in inspect.signature(FlashMoE).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            given = getattr(args, name)
            assert getattr(defaults, name) == parameter.default
            assert (SCORE_NORMS[given] if name == "score_norm" else given) == parameter.default
    options = replace(defaults, score_norm=None, aux_loss_coef=0.5, z_loss_coef=0.25)
    options = replace(options, bias_update_rate=0.125, force_load_balance=True)
    router: Any = Transformer(options).layers[0].get_submodule("moe.router")
    assert router.score_norm is None
    assert (router.aux_loss_coef, router.z_loss_coef) == (0.5, 0.25)
    assert router.key_bias.rate == 0.125
    assert router.force_load_balance


def step_with_router_loss(data: str, table_optimizer: str) -> list[Any]:
    """Loss and learning rates of a step to which the routers' loss adds, and the keys' gradient."""
    import train

    options = ("--table-lr-scale", "4", "--table-optimizer", table_optimizer)
    run = small_run(data, None, *options)
    gradients = []

    def recorded(parameters: Any, max_norm: float) -> torch.Tensor:
        keys = dict(run.model.named_parameters())["layers.1.moe.router.keys.weight"]
        gradients.append(whole(keys.grad).max().item())
        return torch.tensor(1.0)

    def router_loss(model: Any) -> torch.Tensor:
        return 1000 * dict(model.named_parameters())["layers.1.moe.router.keys.weight"].sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "clip_grad_norm_", recorded)
        patch.setattr(train, "router_loss", router_loss)
        expected = run.loss(run.corpus.train, 1, run.args.seed).item()
        report = run.step(1)
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] / run.args.lr for group in groups]
    return [report.loss - expected, gradients[0], *rates]


@pytest.mark.parametrize("table_optimizer", ["adamw", "rowwise-adagrad"])
def test_router_loss_is_trained_on_and_not_reported(
    table_optimizer: str, text: str, rank_pools: RankPools
) -> None:
    (found,) = rank_pools.run(1, step_with_router_loss, text, table_optimizer)
    assert found == pytest.approx([0.0, 1000.0, 1.0, 4.0], abs=1.0)
    assert found[0] == pytest.approx(0.0, abs=1e-5)


def clipped_step(data: str) -> float:
    import train
    from flash_moe_dist.gradients import clip_grad_norm_

    run = small_run(data)
    norms = []

    def recorded(parameters: Any, max_norm: float) -> torch.Tensor:
        parameters = list(parameters)
        norm = clip_grad_norm_(parameters, max_norm)
        norms.append(clip_grad_norm_(parameters, 1e9).item())
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "MAX_GRAD_NORM", 1e-3)
        patch.setattr(train, "clip_grad_norm_", recorded)
        run.step(1)
    return norms[0]


def test_a_step_clips_all_gradients(text: str, rank_pools: RankPools) -> None:
    assert rank_pools.run(2, clipped_step, text) == pytest.approx([1e-3] * 2, rel=1e-3)


def test_model_is_causal_and_knows_relative_positions() -> None:
    from model import ModelConfig, Transformer, rotate

    torch.manual_seed(0)
    # In training, the routers' scores are normalised over all tokens, later ones included.
    model = Transformer(ModelConfig(30, 16, 16, 2, 2, 20, 3)).double().eval()
    tokens = torch.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 30
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])
    query, key = torch.randn(2, 8).double()
    turned = rotate(torch.stack([query, key]).view(2, 1, 1, 8).expand(2, 1, 10, 8))
    products = (turned[0, 0] @ turned[1, 0].t()).diagonal(offset=-3)
    torch.testing.assert_close(products, products[:1].expand(7))
    assert not torch.isclose(products[0], query @ key)


def test_text_of_ids_that_are_no_bytes(text: str) -> None:
    from data import load_corpus
    from train import Run

    run = Run.__new__(Run)
    run.corpus = load_corpus(Path(text), 16, 300)
    assert run.as_text([97, 299, 0xC3, 0xA4, 256]) == "a\ufffd\u00e4\ufffd"


def test_nothing_after_the_last_step_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    def failing(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    run: Any = train.Run.__new__(train.Run)
    monkeypatch.setattr(train.Run, "sample", failing)
    train.finish(run, None)
    assert "the summary failed: OSError(28" in capsys.readouterr().err
    monkeypatch.setattr(train.Run, "sample", lambda _: train.Sample("a", "b"))
    monkeypatch.setattr(train, "plot_metrics", failing)
    monkeypatch.setattr(train, "peak_memory", failing)
    run.args, run.single_token_entropy = parse_args_of_defaults(), lambda: 1.0
    metrics: Any = type("Metrics", (), {"lines": []})
    train.finish(run, metrics)
    said = capsys.readouterr().err
    assert "the metrics cannot be plotted: [Errno 28]" in said
    assert "the summary failed: " in said


def parse_args_of_defaults() -> Any:
    from options import parse_args

    return parse_args("", [])


def test_links_beside_metrics_and_plot_are_not_followed(tmp_path: Path) -> None:
    from metrics import MetricsFile, plot_metrics

    (tmp_path / "file").write_text("content")
    for name in ("metrics.jsonl", "loss.png"):
        (tmp_path / f"{name}.partial").symlink_to("file")
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1, "loss": 1.0})
    metrics.close()
    plot_metrics(tmp_path / "loss.png", metrics.lines, 1.0)
    assert (tmp_path / "file").read_text() == "content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loss.png", "metrics.jsonl"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_default_run(tmp_path: Path) -> None:
    """`launch/train.sh` with default options, except for the folder of results and fewer steps."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Else it would point the active environment at this checkout.
    environment["SKIP_INSTALL"] = "1"
    begin = time.monotonic()
    ended = subprocess.run(
        ["bash", str(REPOSITORY / "launch" / "train.sh"), "--steps", "60", "--out", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    print(f"default run: {time.monotonic() - begin:.0f} s")
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    assert all(line["tokens_per_s"] > 0 for line in metrics)
    world_size = max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    assert all(line["world_size"] == line["ep_size"] == world_size for line in metrics)
    found = re.search(
        r"validation loss ([\d.]+), single-token entropy .* ([\d.]+) nats", ended.stdout
    )
    assert found
    validation_loss, entropy = map(float, found.groups())
    assert validation_loss < entropy - 0.34
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 2
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoints" / f"step-{len(metrics):08d}" / ".metadata").is_file()
    assert "sample, after the prompt" in ended.stdout
    assert "loss=" in ended.stderr
    assert "tokens_per_s=" in ended.stderr
    assert ended.stderr.count("[00:00<?, ?step/s]") == 1, "one progress bar, on rank 0"

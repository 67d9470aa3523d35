"""launch/bench_table_optimizers.py: its rows, and its refusal of wrong steps and bad options."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_table_optimizers
from flash_moe.ops.row_updates import update_rows
from flash_moe.optim import SGD, LazyAdam, RowwiseAdagrad, RowwiseAdam, table_optimizer
from flash_moe.optim.table_optimizer import TableOptimizer, TouchedRows
from flash_moe_dist import clip_grad_norm_
from table_optimizers import measure, training
from table_optimizers.training import KINDS, Case, Training, make_inputs
from table_optimizers.verify import verify

SIZES = (12, 16, 40, 3)
OPTIONS = ["--tokens", "12", "--hidden-size", "16", "--num-experts", "40"]
OPTIONS += ["--num-experts-per-tok", "3", "--repeats", "1"]
# Bytes of tables and state for each table parameter, in either dtype: 16 of them share the numbers
# of a row.
BYTES = {
    "RowwiseAdam": 4 + 2 + (4 + 4) / 16,
    "LazyAdam": 4 + 2 + 4 + 4 / 16,
    "RowwiseAdagrad": 4 + 4 / 16,
    "SGD": 4,
    # Its count of steps is one for each table of 640.
    "AdamW": 4 + 4 + 4 + 4 / 640,
}


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/bench_table_optimizers.py", *options])
    bench_table_optimizers.main()


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FLASH_MOE_BACKEND", "torch_sparse")


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows(
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "optimizers.json"
    run(monkeypatch, *OPTIONS, "--num-layers", "2", "--dtype", dtype, "--json", str(file))
    title, columns, *rows = capsys.readouterr().out.splitlines()
    assert f"T, H, E, K = {SIZES}, layers 2, {dtype}, " in title
    assert columns.split()[:4] == ["tables", "table", "part", "ms"]
    assert [row.split()[0] for row in rows] == [kind.__name__ for kind in KINDS]
    written = json.loads(file.read_text())
    assert written["case"]["num_layers"] == 2
    for row in rows:
        name, table_dtype, *numbers = row.split()
        assert len(numbers) == 10
        result = written["results"][name]
        assert result["table_dtype"] == table_dtype == ("float32" if name == "AdamW" else dtype)
        assert {part: len(one) for part, one in result["seconds"].items()} == dict.fromkeys(
            training.PARTS, 1
        )
        assert numbers[7] == f"{BYTES[name]:.2f}"


def scaled(update: Any) -> Any:
    """The change of weights by an optimizer's `update`, times 1.01."""

    def wrong(self: object, touched: TouchedRows, group: dict[str, Any]) -> None:
        before = touched.weights.clone()
        update(self, touched, group)
        touched.weights.add_(0.01 * (touched.weights - before))

    return wrong


def verified(kind: type[torch.optim.Optimizer], dtype: str) -> float:
    case = Case(*SIZES, 1, dtype)
    return verify(Training(case, make_inputs(case, torch.device("cpu")), kind))


def test_kernels_are_verified(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", "gather")
    case = Case(5, 16, 7, 2, 1, "bfloat16")
    assert verify(Training(case, make_inputs(case, device), RowwiseAdam)) < 2e-3
    update: Any = update_rows

    def twice(*arguments: Any) -> None:
        *others, rule = arguments
        update(*others, rule._replace(lr=2 * rule.lr))

    monkeypatch.setattr(table_optimizer, "update_rows", twice)
    with pytest.raises(RuntimeError, match=r"RowwiseAdam is wrong: relative error 1\.0e\+00"):
        verify(Training(case, make_inputs(case, device), RowwiseAdam))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("kind", [RowwiseAdam, LazyAdam, RowwiseAdagrad, SGD])
def test_a_wrong_update_is_refused(
    kind: type[TableOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verified(kind, "float16") < 1e-3
    monkeypatch.setattr(kind, "update", scaled(kind.update))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(RuntimeError, match=f"{kind.__name__} is wrong: relative error 1.0e-02"):
            verified(kind, dtype)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_clipping_is_refused(
    kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training, "clip_grad_norm_", lambda tables, norm: clip_grad_norm_(tables, 1.1 * norm)
    )
    with pytest.raises(RuntimeError, match=f"{kind.__name__} is wrong"):
        verified(kind, "float32")


@pytest.mark.usefixtures("on_the_cpu")
def test_no_time_for_a_wrong_optimizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "KINDS", (SGD,))
    monkeypatch.setattr(SGD, "update", scaled(SGD.update))
    with pytest.raises(RuntimeError, match="SGD is wrong"):
        run(monkeypatch, *OPTIONS)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("on_the_cpu")
def test_only_dense_gradients_may_be_too_large(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "KINDS", (SGD, torch.optim.AdamW))
    too_large: type = torch.optim.AdamW

    def exhaust(training: Training) -> float:
        if isinstance(training.optimizer, too_large):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return 0.0

    monkeypatch.setattr(measure, "verify", exhaust)
    run(monkeypatch, *OPTIONS)
    assert capsys.readouterr().out.splitlines()[-1].split("  ")[-1] == "out of memory"
    too_large = SGD
    with pytest.raises(torch.OutOfMemoryError):
        run(monkeypatch, *OPTIONS)


@pytest.mark.usefixtures("on_the_cpu")
def test_bad_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        ("--routing zipf", "unrecognized arguments: --routing zipf"),
        ("--num-layers 0", "--num-layers must be positive, got 0"),
        ("--repeats 0", "--repeats must be positive, got 0"),
        ("--dtype float64", "invalid choice: 'float64'"),
        (f"--json {tmp_path}", "--json must be a file, got the folder"),
        ("--json /no/such/b.json", "--json must be in a folder that exists"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *options.split())
        assert ended.value.code == 2
        assert f"bench_table_optimizers.py: error: {message}" in capsys.readouterr().err.replace(
            "argument --dtype: ", ""
        )

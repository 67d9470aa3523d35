"""A loss that is not finite on one rank: all ranks stop, or all skip the step."""

import io
from contextlib import closing, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPools, rank_runtime
from small_run import INTERVALS, launch_with, metrics_of, saved_tensors, small_run

# A skipped step right before a checkpoint, and one before any optimizer state.
STEPS = (1, 4, 6)
ADVICE = "lower --lr, or skip such steps with --on-nonfinite skip"


def train_with(what: str, bad_step: int, text: str, out: Path, *options: str) -> str:
    """Train with a loss of rank 1 that is `what` at a step; return what rank 0 prints."""
    import train
    from flash_moe_dist import Checkpointer
    from metrics import MetricsFile
    from signals import StopSignals

    loss, printed = train.Run.loss, io.StringIO()

    def faulty(run: Any, stream: Any, step: int, seed: int) -> Any:
        value = loss(run, stream, step, seed)
        is_bad = stream is run.corpus.train and (step, run.runtime.rank) == (bad_step, 1)
        return value * float(what) if is_bad else value

    out.mkdir(exist_ok=True)
    run = small_run(text, None, *options, "--out", str(out))
    checkpoints = Checkpointer(out / "checkpoints", run.args.keep)
    metrics = MetricsFile(out / "metrics.jsonl", 0) if rank_runtime().is_main else None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(train.Run, "loss", faulty)
        with (
            closing(metrics) if metrics else nullcontext(),
            closing(checkpoints),
            StopSignals(run.args.grace) as signals,
        ):
            train.train(run, 1, checkpoints, metrics, signals)
    return printed.getvalue()


def assert_stopped_before(step: int, out: Path) -> None:
    """What the bad step would have done is in no file."""
    assert [line["step"] for line in metrics_of(out)] == list(range(1, step))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]


@pytest.mark.slow
def test_the_run_stops_and_says_which(options: tuple[str, ...], tmp_path: Path) -> None:
    fault = {"what": "nan", "where": "after dispatch", "rank": 1, "step": 8}
    fault["mark"] = str(tmp_path / "mark")
    ended = launch_with(fault, *options, "--out", str(tmp_path))
    assert ended.returncode != 0
    assert f"RuntimeError: training loss is nan on rank 1 at step 8: {ADVICE}" in ended.stderr
    assert_stopped_before(8, tmp_path)


def test_all_ranks_stop(text: str, tmp_path: Path, rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, train_with, "inf", 8, text, tmp_path, *INTERVALS):
        assert outcome.kind == "RuntimeError"
        assert outcome.message == f"training loss is inf on rank 1 at step 8: {ADVICE}"
    assert_stopped_before(8, tmp_path)


@pytest.mark.parametrize("step", STEPS)
def test_the_step_is_skipped_on_all_ranks(
    step: int, text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    """Parameters and optimizer are those of a run without this step, learning rates aside."""
    every_step = ("--checkpoint-interval", "1", "--keep", "20", "--steps", "6")
    options = (*every_step, "--on-nonfinite", "skip")
    printed, _ = rank_pools.run(2, train_with, "nan", step, text, tmp_path, *options)
    assert f"training loss is nan on rank 1 at step {step}: skipped" in printed
    line = metrics_of(tmp_path)[step - 1]
    assert line["loss"] is None
    assert line["skipped"] == "training loss is nan on rank 1"
    others = [line for line in metrics_of(tmp_path) if line["step"] != step]
    assert [line["step"] for line in others] == [one for one in range(1, 7) if one != step]
    assert all(line["loss"] > 0 and "skipped" not in line for line in others)
    after = saved_tensors(tmp_path, step)
    assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())
    counts = {name: one for name, one in after.items() if name.endswith(".step.")}
    # An optimizer has no state before its first step.
    assert bool(counts) == (step > 1)
    assert all(count == step - 1 for count in counts.values())
    if step > 1:
        before = saved_tensors(tmp_path, step - 1)
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name

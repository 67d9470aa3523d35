"""A loss that is not finite on one rank: all ranks stop, or all skip the step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SMALL, launch_with, metrics_of, saved_tensors

# A skipped step right before a checkpoint, and one before any optimizer state.
STEPS = (1, 4, 6)


def fault(what: str, step: int, tmp_path: Path) -> dict[str, Any]:
    mark = str(tmp_path / "mark")
    return {"what": what, "where": "after dispatch", "rank": 1, "step": step, "mark": mark}


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_the_run_stops_and_says_which(what: str, options: tuple[str, ...], tmp_path: Path) -> None:
    ended = launch_with(fault(what, 8, tmp_path), *options, "--out", str(tmp_path))
    assert ended.returncode != 0
    assert (
        f"RuntimeError: training loss is {what} on rank 1 at step 8: lower --lr, or skip such "
        "steps with --on-nonfinite skip" in ended.stderr
    )
    # What the bad step would have done is in no file.
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, 8))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


@pytest.mark.parametrize("step", STEPS)
def test_the_step_is_skipped_on_all_ranks(step: int, text: str, tmp_path: Path) -> None:
    """Parameters and optimizer are those of a run without this step, learning rates aside."""
    every_step = ("--checkpoint-interval", "1", "--keep", "20", "--steps", "6")
    ended = launch_with(
        fault("nan", step, tmp_path),
        *(*SMALL, *every_step, "--sample-tokens", "2", "--on-nonfinite", "skip"),
        *("--data", text, "--out", str(tmp_path)),
    )
    assert ended.returncode == 0, ended.stderr
    assert f"training loss is nan on rank 1 at step {step}: skipped" in ended.stdout
    line = metrics_of(tmp_path)[step - 1]
    assert line["loss"] is None
    assert line["skipped"] == "training loss is nan on rank 1"
    others = [line for line in metrics_of(tmp_path) if line["step"] != step]
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

"""One rank fails: all processes end in time, and the first error is what the user sees."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import assert_nothing_left, free_port
from small_run import start

from flash_moe_dist import runtime

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent
SCRIPT = str(REPOSITORY / "tests" / "failing_rank.py")
TIMEOUT = 6.0
GRACE = 10.0
RANKS = 2
# What gloo says; nccl, or the layer where ranks wait in each other's memory.
LATE_ON_CPUS = ("Timed out waiting",)
LATE_ON_GPUS = ("collective operation timeout", "a rank did not come within the group's timeout")
PLACES = ("before dispatch", "in the experts", "after combine", "in the backward pass")


def says_late(said: str, on_gpus: bool) -> bool:
    return any(late in said for late in (LATE_ON_GPUS if on_gpus else LATE_ON_CPUS))


def environment(ranks: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if torch.cuda.device_count() < ranks:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def torchrun(where: str, how: str, mark: Path, ranks: int = RANKS) -> subprocess.Popen[str]:
    """Experts are shared out by all ranks, or by two pairs of four."""
    args = (where, how, str(TIMEOUT), str(mark), "2" if ranks == 4 else str(ranks))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node", str(ranks), SCRIPT, *args],
        env=environment(ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def assert_ends_in_time(started: list[subprocess.Popen[str]], mark: Path) -> list[str]:
    """All end, none well, within TIMEOUT + GRACE of the mark; returns what each had to say."""
    try:
        said = [process.communicate(timeout=150)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    ended = time.time() - mark.stat().st_mtime
    assert all(process.returncode != 0 for process in started)
    assert ended <= TIMEOUT + GRACE, f"ended {ended:.0f} s after the failure"
    assert_nothing_left(str(mark))
    return said


def test_an_exception_on_one_rank_ends_all(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (said,) = assert_ends_in_time([torchrun("in the backward pass", "raises", mark)], mark)
    assert "Traceback" in said
    assert "in the_original_error" in said
    assert "KeyError: 'the original error'" in said


@pytest.mark.parametrize(
    ("where", "ranks"),
    [(PLACES[0], 4), *((where, RANKS) for where in (*PLACES[1:], "before a collective"))],
)
def test_a_stalled_rank_ends_all(where: str, ranks: int, tmp_path: Path) -> None:
    """With 4 ranks, groups of two share the experts; their timeout must be that of all ranks."""
    mark = tmp_path / "mark"
    (said,) = assert_ends_in_time([torchrun(where, "stalls", mark, ranks)], mark)
    assert says_late(said, torch.cuda.device_count() >= ranks), said[-5000:]


@pytest.mark.parametrize(("given", "taken"), [("1", "3"), ("0", "0"), ("2", "2"), (None, None)])
def test_watchdog_of_nccl_does_not_wait_for_kernels(
    given: str | None, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sets 1; other values were chosen by the user and stay."""
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    monkeypatch.setenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "700")
    if given is not None:
        monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", given)
    runtime._configure_nccl_watchdog()
    assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == taken
    assert os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "700"


@pytest.mark.parametrize("where", PLACES)
def test_an_exception_ends_ranks_that_nobody_watches(where: str, tmp_path: Path) -> None:
    """Ranks are started without torchrun, which would end the other processes."""
    mark, port = tmp_path / "mark", free_port()
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, where, "raises", str(TIMEOUT), str(mark), str(RANKS)],
            env=environment(RANKS)
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = assert_ends_in_time(started, mark)
    assert "KeyError: 'the original error'" in said[1]


# In launch/train.py.
IN_TRAINING = ("before dispatch", "in dispatch", "after dispatch", "writing")


def train_with(what: str, where: str, tmp_path: Path, options: tuple[str, ...]) -> tuple[str, str]:
    """Run until all processes have ended, in time and with nothing left; return the output."""
    mark, port = tmp_path / "mark", free_port()
    fault = {"what": what, "where": where, "rank": 1, "step": 6, "mark": str(mark)}
    process = start(
        *options,
        *("--out", str(tmp_path), "--timeout", str(TIMEOUT), "--grace", "3"),
        script="tests/faulty_train.py",
        launcher=("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
        FAULT=json.dumps(fault),
    )
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode != 0
    ended = time.time() - mark.stat().st_mtime
    assert ended <= TIMEOUT + GRACE, f"ended {ended:.0f} s after the failure"
    assert_nothing_left(str(tmp_path), port)
    return out, err


@pytest.mark.parametrize("where", IN_TRAINING)
def test_an_exception_in_training_is_what_the_user_sees(
    where: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    _, said = train_with("raises", where, tmp_path, options)
    first = said[said.index("Root Cause (first observed failure)") :]
    assert "KeyError: 'the original error'" in first
    assert "in strike" in first or where == "writing"


def test_a_stall_in_training_says_where(options: tuple[str, ...], tmp_path: Path) -> None:
    """The others' wait is the first error; the stack of the one that stalls comes with it."""
    _, said = train_with("stalls", "in dispatch", tmp_path, options)
    assert says_late(said, torch.cuda.device_count() >= 2)
    assert "Root Cause (first observed failure)" in said
    stack = said[said.index("Timeout (0:00:03)!") :]
    assert "in strike" in stack

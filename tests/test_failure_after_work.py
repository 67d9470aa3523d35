"""Failures after the work: one note, status 0, no rank waits, nothing else on the screen."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forking import FORKS, share_imports, start_context
from processes import free_port
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from failure_after_work import note_failure_after_work

RANKS = 3
# Where processes are not forks, each imports PyTorch.
TIMES = 5 if FORKS else 1
NOTE = "all steps are done, but the summary failed"


def fail_on_one_rank(rank: int, failing: int, others: str, port: int, screen: str) -> None:
    share_imports()
    file = os.open(screen, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    timeout = timedelta(seconds=30)
    # Served by rank 0, as where TORCH_DISABLE_SHARE_RDZV_TCP_STORE is 1.
    store = TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
    with note_failure_after_work(NOTE):
        if rank == failing:
            raise OSError(28, "No space left on device")
        if others == "wait":
            # As in a collective of NCCL, which does not notice that a rank has ended.
            time.sleep(100)
        dist.all_reduce(torch.ones(1))
    raise AssertionError("goes on")


@pytest.mark.parametrize("others", ["wait", "reduce"])
@pytest.mark.parametrize("failing", [0, 1])
def test_one_note_and_status_0_on_all_ranks(failing: int, others: str, tmp_path: Path) -> None:
    runs = []
    for number in range(TIMES):
        screen = tmp_path / str(number)
        screen.touch()
        given = failing, others, free_port(), str(screen)
        run = [
            start_context().Process(target=fail_on_one_rank, args=(rank, *given), daemon=True)
            for rank in range(RANKS)
        ]
        for process in run:
            process.start()
        for process in run:
            process.join(60)
        runs.append(([process.exitcode for process in run], screen.read_text()))
    said = f"{NOTE}: OSError(28, 'No space left on device')\n"
    assert runs == [([0] * RANKS, said)] * TIMES

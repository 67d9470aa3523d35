"""Killed, stopped or ended, a run goes on as if nothing had happened."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest
from processes import assert_nothing_left
from small_run import (
    STEPS,
    assert_same_run,
    launch,
    launch_with,
    metrics_of,
    start_slow,
    steps_done,
    workers_of,
)

pytestmark = pytest.mark.slow


def checkpoints_in(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


# Where and in which step, one restart after the other, and whether torchrun's store is not for its
# processes, as launch/train.sh has it. Step 3 comes before any checkpoint.
KILLED_IN_A_STEP = [
    ([("before dispatch", 3), ("after dispatch", 13)], "0"),
    ([("in dispatch", 9)], "1"),
]


@pytest.mark.parametrize(("killed", "not_shared"), KILLED_IN_A_STEP)
def test_a_rank_killed_in_a_step_and_restarted(
    killed: list[tuple[str, int]],
    not_shared: str,
    options: tuple[str, ...],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    marks = [tmp_path / f"mark {step}" for _, step in killed]
    faults = [
        {"what": "sigkill", "where": where, "rank": 1, "step": step, "mark": str(mark)}
        for (where, step), mark in zip(killed, marks, strict=True)
    ]
    ended = launch_with(
        faults,
        *options,
        *("--out", str(tmp_path)),
        launcher=("--standalone", "--max-restarts", str(len(killed))),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=not_shared,
        seconds=200,
    )
    assert ended.returncode == 0, ended.stderr
    assert all(mark.exists() for mark in marks)
    resumed = re.findall(r"resuming after step (\d+) of 20", ended.stdout)
    assert list(map(int, resumed)) == [step // 6 * 6 for _, step in killed if step > 6]
    assert_same_run(tmp_path, uninterrupted)
    assert_nothing_left(str(tmp_path))


# Where and at which checkpoint, one resumed run after the other, and the steps that are complete
# then.
KILLED_WHILE_SAVING = [("writing", 12, [6]), ("written", 12, [6]), ("pruning", 6, [6, 12, 18])]


@pytest.mark.parametrize("thread", [(), ("--async-checkpoint",)], ids=["saved", "saved by thread"])
def test_killed_while_saving(
    thread: tuple[str, ...], options: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    """The checkpoint before still loads; the next save removes what the killed one left."""
    arguments = (*options, *thread, "--out", str(tmp_path))
    resume: tuple[str, ...] = ()
    newest = 0
    for where, step, complete in KILLED_WHILE_SAVING[: 2 if thread else 3]:
        fault = {"what": "sigkill", "where": where, "rank": 0, "step": step}
        ended = launch_with(fault | {"mark": str(tmp_path / where)}, *arguments, *resume)
        assert ended.returncode != 0
        assert (tmp_path / where).exists()
        assert (f"resuming after step {newest} of 20" in ended.stdout) == (newest > 0)
        # Of what pruning has begun with, the name is taken away first.
        found = checkpoints_in(tmp_path)
        whole = [name for name in found if "." not in name]
        assert whole == names(*complete[1:] if where == "pruning" else complete)
        assert len(found) == len(whole) + 1
        resume, newest = ("--resume",), complete[-1]
    if not thread:
        ended = launch(*arguments)
        assert ended.returncode != 0
        assert f"holds a checkpoint of step {newest}: --resume continues from it" in ended.stderr
    ended = launch(*arguments, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert f"resuming after step {newest} of 20" in ended.stdout
    assert checkpoints_in(tmp_path) == names(18, 20)
    assert_same_run(tmp_path, uninterrupted)


def to_torchrun(process: Popen[str]) -> None:
    process.terminate()


def to_one_rank(process: Popen[str]) -> None:
    os.kill(workers_of(process)[-1], signal.SIGTERM)


@pytest.mark.parametrize(
    ("signalled", "thread"), [(to_torchrun, ("--async-checkpoint",)), (to_one_rank, ())]
)
def test_sigterm_saves_and_ends(
    signalled: Callable[[Popen[str]], None],
    thread: tuple[str, ...],
    options: tuple[str, ...],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    process = start_slow(tmp_path, *options, *thread, "--checkpoint-interval", "100")
    workers, begin = workers_of(process), time.monotonic()
    assert len(workers) == 2
    signalled(process)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 15
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    ended = re.search(r"SIGTERM: ended after step (\d+) of 20, with a checkpoint", out)
    assert ended, (out, err)
    last = int(ended[1])
    assert 5 <= last < STEPS
    # torchrun itself reports the signal that it got.
    assert process.returncode == (1 if signalled is to_torchrun else 0)
    assert checkpoints_in(tmp_path) == names(last)
    assert steps_done(tmp_path) == last
    resumed = launch(*options, "--resume", "--out", str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {last} of 20" in resumed.stdout
    assert_same_run(tmp_path, uninterrupted)
    assert_nothing_left(str(tmp_path))


def test_torchrun_killed_takes_its_processes_along(
    options: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    process = start_slow(tmp_path, *options, "--checkpoint-interval", "3")
    process.kill()
    process.communicate(timeout=10)
    assert_nothing_left(str(tmp_path))
    # With the options of the start, which are not given again.
    resumed = launch("--resume", "--out", str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 3 of 20" in resumed.stdout
    assert "changed: " not in resumed.stdout
    assert_same_run(tmp_path, uninterrupted)


def test_resume_after_the_end_trains_only_further_steps(
    options: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    arguments = (*options, "--out", str(out), "--resume")
    again = launch(*arguments)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 20 of 20: nothing to do, a larger --steps" in again.stdout
    assert_same_run(out, uninterrupted)
    longer = launch(*arguments, "--steps", "23")
    assert longer.returncode == 0, longer.stderr
    assert "resuming after step 20 of 23\nchanged: --steps 20 before, 23 now\n" in longer.stdout
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 24))
    assert checkpoints_in(out)[-1] == names(23)[0]


def test_resume_with_other_ranks_says_so(
    options: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    shutil.rmtree(out / "checkpoints" / names(20)[0])
    resumed = launch(*options, "--out", str(out), "--resume", ranks=3)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 18 of 20\nchanged: world_size 2 before, 3 now\n" in resumed.stdout
    for line, expected in zip(metrics_of(out), metrics_of(uninterrupted), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)

"""Two torchrun agents, as on two machines, joined by a rendezvous."""

import os
import re
import signal
import time
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import pytest
import torch
from processes import assert_nothing_left, free_port, wait_for_listener
from small_run import assert_same_run, start_slow, steps_done, workers_of

pytestmark = pytest.mark.slow

README = Path(__file__).parent.parent / "launch" / "README.md"


def documented(port: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """Launcher options and variables of launch/README.md, for two agents on this machine."""
    form = re.search(r'TORCHRUN_ARGS="(--nnodes [^"]*)"', README.read_text())
    assert form
    options = form[1].replace("HOST:PORT", f"127.0.0.1:{port}").split()
    return (*options, "--local-addr", "127.0.0.1"), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start_agent(number: int, out: Path, port: int, *options: str, **how: Any) -> Popen[str]:
    launcher, variables = documented(port)
    gpu = str(number) if torch.cuda.device_count() >= 2 else ""
    how |= variables | {"CUDA_VISIBLE_DEVICES": gpu}
    return start_slow(out, *options, launcher=launcher, ranks=1, **how)


def kill_machine(agent: Popen[str]) -> None:
    for process in (*workers_of(agent), agent.pid):
        os.kill(process, signal.SIGKILL)


def kill_agent(agent: Popen[str]) -> None:
    agent.kill()


def what_it_said(agent: Popen[str]) -> tuple[str, str]:
    try:
        return agent.communicate(timeout=120)
    except TimeoutExpired:
        agent.kill()
        return agent.communicate()


@pytest.mark.parametrize("kill", [kill_machine, kill_agent])
def test_one_of_two_agents_is_killed_and_comes_back(
    kill: Any, options: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    port = free_port()
    first = start_agent(0, tmp_path, port, *options, steps=0)
    # The one that comes first keeps the rendezvous.
    wait_for_listener(port)
    second = start_agent(1, tmp_path, port, *options, steps=8)
    kill(second)
    second.communicate(timeout=10)
    time.sleep(2)
    done = steps_done(tmp_path)
    assert 8 <= done < 20, "the run has gone on with one machine"
    again = start_agent(1, tmp_path, port, *options, steps=0)
    said = [what_it_said(agent) for agent in (first, again)]
    assert first.returncode == again.returncode == 0, said
    assert any("resuming after step 6 of 20" in out for out, _ in said)
    assert_same_run(tmp_path, uninterrupted)
    assert_nothing_left(str(tmp_path), port)

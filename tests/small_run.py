"""Start a small `Run` of launch/train.py, on the ranks of a pool or under torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ranks import rank_runtime
from sharded import whole
from torch import Tensor

REPOSITORY = Path(__file__).parent.parent
STEPS = 20
SMALL = (
    *("--steps", str(STEPS), "--batch-size", "12", "--seq-len", "16", "--hidden-size", "16"),
    *("--intermediate-size", "16", "--num-layers", "2", "--num-heads", "2"),
    *("--num-experts", "50", "--num-experts-per-tok", "4", "--precision", "float32"),
    *("--lr", "0.002", "--table-optimizer", "adamw"),
)
# For runs that are interrupted; neither divides the other, so that a restart repeats steps.
INTERVALS = ("--checkpoint-interval", "6", "--validation-interval", "5", "--sample-tokens", "4")


def write_text(path: Path) -> str:
    """Write a file of text to train on; return its path."""
    path.write_bytes(Path(json.__file__).read_bytes() * 3)
    return str(path)


def small_run(data: str, ep_size: int | None = None, *options: str) -> Any:
    from options import parse_args
    from train import Run, prepare

    out = str(Path(data).parent / "out")
    args = parse_args("", [*SMALL, "--data", data, "--out", out, *options])
    runtime = rank_runtime(ep_size)
    corpus, config = prepare(args, runtime, {})
    return Run(args, runtime, corpus, config)


def everything_in(run: Any) -> dict[str, Tensor]:
    """Gather unsharded parameters and optimizer state, by name."""
    found = {}
    for name, parameter in run.model.named_parameters():
        found[name] = whole(parameter).clone()
        for optimizer in run.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{key} of {name}"] = whole(value).clone()
    return found


def start(
    *options: str,
    ranks: int = 2,
    script: str = "launch/train.py",
    launcher: tuple[str, ...] = ("--standalone",),
    **variables: str,
) -> subprocess.Popen[str]:
    """Start a script under torchrun, as a new session, so that signals reach only it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "launch", REPOSITORY / "tests")))
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    if torch.cuda.device_count() < ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher]
    command += ["--nproc-per-node", str(ranks), str(REPOSITORY / script)]
    return subprocess.Popen(
        [*command, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(*options: str, seconds: float = 100, **how: Any) -> subprocess.CompletedProcess[str]:
    """Start a script and wait until it ends."""
    process = start(*options, **how)
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launch_with(
    fault: dict[str, Any] | list[dict[str, Any]], *options: str, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run tests/faulty_train.py with a fault or several, and wait until it ends."""
    return launch(*options, script="tests/faulty_train.py", FAULT=json.dumps(fault), **how)


def start_slow(out: Path, *options: str, steps: int = 5, **how: Any) -> subprocess.Popen[str]:
    """Start a run whose steps take at least 0.1 s; return after `steps` steps."""
    slow = json.dumps({"slow": 0.1})
    script = "tests/faulty_train.py"
    process = start(*options, "--out", str(out), script=script, FAULT=slow, **how)
    wait_for_steps(out, steps, process)
    return process


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if steps_done(out) >= steps:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"no {steps} steps in a minute, but {steps_done(out)}")


def steps_done(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, children.split()))


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def saved_tensors(out: Path, step: int) -> dict[str, Tensor]:
    """Load all tensors of a checkpoint, unsharded, by name."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole_file = out / f"{step}.pt"
    dcp_to_torch_save(out / "checkpoints" / f"step-{step:08d}", whole_file)
    found: dict[str, Tensor] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                collect(f"{prefix}{key}.", one)
        elif isinstance(value, torch.Tensor):
            found[prefix] = value

    collect("", torch.load(whole_file, weights_only=False))
    return found


def assert_same_run(out: Path, other: Path) -> None:
    """Assert bitwise equality of all losses, and of parameters, optimizer state and generators."""
    losses, expected_losses = (
        [(line["step"], line["loss"], line.get("validation_loss")) for line in metrics_of(of)]
        for of in (out, other)
    )
    assert [step for step, *_ in losses] == list(range(1, STEPS + 1))
    assert losses == expected_losses
    tensors, expected = saved_tensors(out, STEPS), saved_tensors(other, STEPS)
    assert tensors.keys() == expected.keys()
    assert any("exp_avg_sq" in name for name in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name

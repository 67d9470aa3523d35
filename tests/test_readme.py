"""The examples of the README do what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parent.parent
OP_EXAMPLE, SHARD_EXAMPLE, MODEL_EXAMPLE, SAVE_EXAMPLE = re.findall(
    r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL
)


def run_script(path: Path, *launcher: str, folder: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *launcher, str(path)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_op_example(tmp_path: Path) -> None:
    script = tmp_path / "op.py"
    script.write_text(OP_EXAMPLE + "print(out.shape, down_weights.grad.shape)")
    assert "torch.Size([64, 256]) torch.Size([10000, 256])" in run_script(script)


def torchrun(script: Path, ranks: int) -> str:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return run_script(script, *launcher, folder=script.parent)


def test_shard_example(tmp_path: Path) -> None:
    script = tmp_path / "shard.py"
    script.write_text(SHARD_EXAMPLE)
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    printed = torchrun(script, ranks)
    # The ranks print at the same time: their lines may mix.
    assert printed.count(f"torch.Size([{100_000 // ranks}, 256])") == ranks


def test_model_example(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count() if torch.cuda.is_available() else 4
    if ranks < 4:
        pytest.skip(f"needs four GPUs or none, this machine has {ranks}")
    script = tmp_path / "model.py"
    script.write_text(MODEL_EXAMPLE)
    # 32 tokens of 16 experts on each of the two ranks that share one copy of the experts.
    assert torchrun(script, 4).startswith("1,024 pairs, busiest rank ")


def test_save_example(tmp_path: Path) -> None:
    script = tmp_path / "save.py"
    script.write_text(SAVE_EXAMPLE)
    for step in (1, 2):
        torchrun(script, min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2)
        assert (tmp_path / "out" / "checkpoints" / f"step-{step:08d}").is_dir()
    tables = load_file(tmp_path / "out" / "experts.safetensors")
    assert {name: table.shape for name, table in tables.items()} == dict.fromkeys(
        ("down_weights", "up_weights"), (100_000, 64)
    )

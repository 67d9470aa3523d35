"""Long runs, and many short ones in one process, need no more memory, files and threads in time."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPools, rank_runtime
from small_run import launch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

pytestmark = pytest.mark.slow

MAX_TOKENS = 60
# Steps, and by how much the resident set may vary after the first quarter of them. Without a GPU
# it grows by 0.4 MiB from step 100 to 400; the bounds show a leak of 3.5 KiB a step.
STEPS, RSS_BYTES = 400, 2**20
STEPS_ON_GPUS, RSS_BYTES_ON_GPUS = 2000, 6 * 2**20


def usage() -> dict[str, int]:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    (resident,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    (threads,) = (line for line in status.splitlines() if line.startswith("Threads"))
    return {
        "bytes allocated": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        "resident bytes": int(resident.split()[1]) * 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(threads.split()[1]),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
    }


def train_with_varying_tokens(
    folder: str, dispatchers: tuple[Any, ...], steps: int
) -> list[dict[str, int]]:
    """Usage after each quarter of the steps; a rank has between 0 and MAX_TOKENS tokens in each.

    dispatchers: dispatcher of each layer.
    """
    from flash_moe import FlashMoE
    from flash_moe_dist import ExpertParallel, clip_grad_norm_, count_load
    from flash_moe_dist.checkpoint import Checkpointer

    torch.manual_seed(0)
    runtime = rank_runtime()
    layers = [FlashMoE(16, 16, num_experts=48, num_experts_per_tok=4) for _ in dispatchers]
    model = nn.Sequential(nn.Linear(8, 16), *layers).to(runtime.device)
    for layer, dispatcher in zip(layers, dispatchers, strict=True):
        parallelize_module(layer, runtime.ep_mesh, {"experts": ExpertParallel(dispatcher)})
    tables = {table for layer in layers for table in layer.experts.parameters()}
    fully_shard(model, mesh=runtime.dp_mesh, ignored_params=tables)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpointer(Path(folder), keep=1, asynchronous=True)
    draw = torch.Generator().manual_seed(runtime.rank)
    found = []
    for step in range(1, steps + 1):
        tokens = int(torch.randint(MAX_TOKENS + 1, (), generator=draw))
        rows = torch.randn(tokens, 8, generator=draw).to(runtime.device)
        with count_load(model):
            model(rows).square().sum().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 20) == 0:
            checkpoints.save(step, model, optimizer)
        if step % (steps // 4) == 0:
            checkpoints.wait()
            found.append(usage())
    checkpoints.close()
    return found


def assert_flat(found: list[dict[str, int]], names: tuple[str, ...], rss_bytes: int) -> None:
    for name in names:
        allowed = rss_bytes if name == "resident bytes" else 0
        after_warm_up = [one[name] for one in found]
        assert max(after_warm_up) - after_warm_up[0] <= allowed, f"{name}: {after_warm_up}"


def test_many_steps(tmp_path: Path, rank_pools: RankPools) -> None:
    args = (str(tmp_path), ("all_to_all", "all_gather"), STEPS)
    for found in rank_pools.run(2, train_with_varying_tokens, *args):
        assert_flat(found, ("resident bytes", "files", "threads", "tensors"), RSS_BYTES)


@pytest.mark.gpu
def test_many_steps_with_nccl(tmp_path: Path, rank_pools: RankPools) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    args = (str(tmp_path), ("auto",), STEPS_ON_GPUS)
    names = ("bytes allocated", "resident bytes", "files", "threads", "tensors")
    for found in rank_pools.run(2, train_with_varying_tokens, *args, backend="nccl"):
        assert_flat(found, names, RSS_BYTES_ON_GPUS)


def test_fifty_times_in_one_process(tmp_path: Path) -> None:
    """Ranks print what they use after the 10th and each later 10th time."""
    ended = launch(str(tmp_path), script="tests/fifty_times.py", seconds=300)
    assert ended.returncode == 0, ended.stderr
    names = ("bytes allocated", "resident bytes", "files", "threads")
    for rank in range(2):
        text = (tmp_path / f"{rank}.jsonl").read_text()
        found: list[dict[str, int]] = [json.loads(line) for line in text.splitlines()]
        assert len(found) == 5
        assert_flat(found, names, RSS_BYTES_ON_GPUS)

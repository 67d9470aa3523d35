"""Starts processes of ranks as forks of a server that has imported PyTorch, which takes seconds.

The server imports nothing of this project: each fork does. On a machine with GPUs, whose driver
does not survive a fork, processes start as usual. So do scripts under torchrun.
"""

import gc
import multiprocessing.forkserver as forkserver
import os
from typing import Any

import torch
import torch.multiprocessing as mp

FORKS = not torch.cuda.is_available()
PRELOADED = [
    "torch._dynamo.testing",
    "torch.distributed.checkpoint.format_utils",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.profiler",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "safetensors.torch",
    "tqdm",
    "pytest",
]


def start_context() -> Any:
    """The context of `multiprocessing` by which tests start processes."""
    if not FORKS:
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # With more, NumPy starts threads as it is imported, and these do not survive a fork.
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    forkserver.ensure_running()
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = threads
    return context


def share_imports() -> None:
    """Leave the memory of all that is imported to be shared with the server: to be called first.

    Collecting garbage, and freeing everything at the end, would write to each object.
    """
    gc.freeze()

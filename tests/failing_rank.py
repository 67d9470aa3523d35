"""A training loop in which rank 1 fails at the third step, for tests/test_failures.py.

failing_rank.py where how timeout mark ep_size
    where    "before dispatch", "in the experts", "after combine", "in the backward pass" or
             "before a collective" of something else than the layer, whose backward pass follows
    how      "raises" or "stalls"
    timeout  of collectives, in seconds
    mark     file to touch at the moment of failing
    ep_size  ranks that share out the experts
"""

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe import FlashExperts
from flash_moe_dist import ExpertParallel
from flash_moe_dist.dispatch import autograd
from flash_moe_dist.runtime import distributed

where, how, timeout, mark, ep_size = sys.argv[1:]


def the_original_error() -> None:
    Path(mark).touch()
    if how == "stalls":
        time.sleep(1000)
    raise KeyError("the original error")


with distributed(timedelta(seconds=float(timeout)), int(ep_size)) as runtime:
    experts = FlashExperts(10, 8, runtime.device)
    parallelize_module(experts, runtime.ep_mesh, ExpertParallel())
    for step in range(5):
        failing = runtime.rank == 1 and step == 2
        if failing and where == "before dispatch":
            the_original_error()
        if failing and where == "in the experts":

            def fail(*_: Any, **__: Any) -> Any:
                the_original_error()

            patched: Any = autograd
            patched.expert_forward = fail
        hidden_states = torch.randn(6, 8, device=runtime.device, requires_grad=True)
        indices = torch.randint(10, (6, 8), device=runtime.device)
        out = experts(hidden_states, indices, torch.ones(6, 8, device=runtime.device))
        if failing and where == "after combine":
            the_original_error()
        if failing and where == "in the backward pass":
            autograd.token_grads = lambda *_: the_original_error()  # type: ignore
        if where == "before a collective":
            if failing:
                the_original_error()
            dist.all_reduce(torch.zeros(1, device=runtime.device))
        out.sum().backward()
        if where == "before a collective":
            # The host waits for both, as it does where it reads a norm.
            torch.zeros(1, device=runtime.device).item()
print("finished")

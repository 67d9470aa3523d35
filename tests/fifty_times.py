"""Under torchrun: fifty times a process group, a step of sharded experts, a checkpoint, the end.

fifty_times.py folder      for what each rank uses after every tenth time
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from test_leaks import usage
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe import FlashExperts
from flash_moe_dist import ExpertParallel
from flash_moe_dist.checkpoint import Checkpointer
from flash_moe_dist.runtime import distributed

folder = Path(sys.argv[1])
for time in range(1, 51):
    with distributed(timedelta(seconds=60)) as runtime:
        experts = FlashExperts(10, 8, runtime.device)
        parallelize_module(experts, runtime.ep_mesh, ExpertParallel())
        optimizer = torch.optim.AdamW(experts.parameters())
        rows = torch.randn(6, 8, device=runtime.device)
        indices = torch.randint(10, (6, 3), device=runtime.device)
        experts(rows, indices, torch.ones(6, 3, device=runtime.device)).sum().backward()
        optimizer.step()
        checkpoints = Checkpointer(folder / "checkpoints", keep=1, asynchronous=time % 2 == 0)
        checkpoints.save(time, experts, optimizer)
        checkpoints.close()
        rank = runtime.rank
    del experts, optimizer, runtime, checkpoints
    if time % 10 == 0:
        with (folder / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps(usage()) + "\n")

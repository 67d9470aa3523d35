"""Start ranks many times that call collectives up to the end, and end as Python does.

many_ends.py times      prints the exit codes of ranks that did not end with 0

PyTorch is imported once, and each rank is a fork; unlike those of `multiprocessing`, these finalize
Python. A long switch interval keeps Python's lock in one thread, as on a busy machine.
"""

import os
import sys

import torch
import torch.distributed as dist
from processes import free_port

from flash_moe_dist.runtime import distributed

RANKS = 4


def rank_main(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed() as runtime:
        kept.append(runtime.ep_mesh.get_group())
        sys.setswitchinterval(1000)
        for _ in range(5):
            sent, received = torch.ones(1000), torch.empty(1000)
            dist.all_to_all_single(received, sent, async_op=True).wait()


# A layer that lives as long as the process keeps its group.
kept: list[dist.ProcessGroup] = []
for _ in range(int(sys.argv[1])):
    port = free_port()
    ranks = []
    for rank in range(RANKS):
        if (process := os.fork()) == 0:
            rank_main(rank, port)
            sys.exit(0)
        ranks.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
    if any(codes):
        print(codes, flush=True)

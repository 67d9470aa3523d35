"""flash-moe on many devices: experts sharded over ranks, tokens routed to their owners."""

from flash_moe_dist.expert_parallel import ExpertParallel
from flash_moe_dist.gradients import clip_grad_norm_
from flash_moe_dist.initialization import init_normal_rows_, materialize
from flash_moe_dist.load import ExpertLoad, count_load
from flash_moe_dist.phases import time_phases

__all__ = [
    "ExpertLoad",
    "ExpertParallel",
    "clip_grad_norm_",
    "count_load",
    "init_normal_rows_",
    "materialize",
    "time_phases",
]

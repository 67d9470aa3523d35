"""flash-moe on many devices: experts sharded over ranks, tokens routed to their owners."""

from flash_moe_dist.expert_parallel import ExpertParallel
from flash_moe_dist.gradients import clip_grad_norm_
from flash_moe_dist.initialization import materialize, normal_rows_
from flash_moe_dist.load import ExpertLoad, count_load
from flash_moe_dist.steps import time_steps

__all__ = [
    "ExpertLoad",
    "ExpertParallel",
    "clip_grad_norm_",
    "count_load",
    "materialize",
    "normal_rows_",
    "time_steps",
]

"""flash-moe on many devices: experts sharded over ranks, tokens routed to their owners."""

from flash_moe_dist.expert_parallel import ExpertParallel

__all__ = ["ExpertParallel"]

"""flash-moe: Mixture-of-Experts layers with very many tiny experts, on one device."""

from flash_moe.layers.experts import FlashExperts
from flash_moe.layers.moe import FlashMoE
from flash_moe.layers.router import ProductKeyRouter
from flash_moe.ops.flash_expert import ragged_flash_expert_func, triton_flash_expert_func

__all__ = [
    "FlashExperts",
    "FlashMoE",
    "ProductKeyRouter",
    "ragged_flash_expert_func",
    "triton_flash_expert_func",
]

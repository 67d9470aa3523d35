"""Mixture-of-Experts layers with very many tiny experts, on one device.

    FlashMoE                    layer of router, experts, and an MLP that all tokens share
    FlashExperts                module of the experts' two tables; each row is one expert
    ProductKeyRouter            module that chooses K experts for each token
    router_loss                 the routers' auxiliary losses, to add to a model's loss
    triton_flash_expert_func    the op, with K experts for each token
    ragged_flash_expert_func    the op, with any number of experts for each token
    raise_index_errors          wait for the device; raise if an expert index was out of range

`flash_moe.optim` has optimizers of the tables. `flash_moe_dist` shards these layers over many
devices.
"""

from flash_moe import deprecated
from flash_moe.layers.experts import FlashExperts
from flash_moe.layers.moe import FlashMoE
from flash_moe.layers.router import ProductKeyRouter
from flash_moe.layers.router_loss import router_loss
from flash_moe.ops.flash_expert import ragged_flash_expert_func, triton_flash_expert_func
from flash_moe.ops.indices import raise_index_errors

__version__ = "0.3.0"
__all__ = [
    "FlashExperts",
    "FlashMoE",
    "ProductKeyRouter",
    "__version__",
    "ragged_flash_expert_func",
    "raise_index_errors",
    "router_loss",
    "triton_flash_expert_func",
]

deprecated.register(deprecated.MODULES, deprecated.NAMES)

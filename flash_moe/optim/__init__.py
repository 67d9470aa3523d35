"""Optimizers of expert tables that touch only the rows a step used, without a dense gradient.

    RowwiseAdam      a first moment for each element, a second moment for each row
    LazyAdam         both moments for each element
    RowwiseAdagrad   a sum of squares for each row
    SGD              no state but the missing bits of 16-bit tables

Each is a `torch.optim.Optimizer` for the tables of `flash_moe.FlashExperts` alone; the other
parameters keep an optimizer of PyTorch's. Clip by `flash_moe_dist.clip_grad_norm_`, which knows
both kinds of gradients.
"""

from flash_moe.optim.table_optimizers import SGD, LazyAdam, RowwiseAdagrad, RowwiseAdam

__all__ = ["SGD", "LazyAdam", "RowwiseAdagrad", "RowwiseAdam"]

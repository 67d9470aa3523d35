"""The optimizer of the language models, and its learning rates."""

from collections.abc import Iterator

import torch
from torch import nn

from flash_moe import FlashExperts
from flash_moe_dist import parameter_groups

MAX_GRAD_NORM = 1.0


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the tables of all expert layers."""
    for module in model.modules():
        if isinstance(module, FlashExperts):
            yield from module.parameters()


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Build AdamW with two parameter groups: dense parameters, then the experts' tables, if any."""
    tables = dict.fromkeys(expert_parameters(model))
    dense = [parameter for parameter in model.parameters() if parameter not in tables]
    return torch.optim.AdamW(
        [*parameter_groups(dense), *parameter_groups(tables)],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, table_lr_scale: float) -> None:
    """Set the learning rate of the dense parameters, and `table_lr_scale` times it for the tables.

    optimizer: one of `build_optimizer`. Entries of its groups are saved in checkpoints, so that the
        factor is none of them.
    """
    for group, scale in zip(optimizer.param_groups, (1.0, table_lr_scale), strict=False):
        group["lr"] = lr * scale


def learning_rate_factor(step: int, steps: int) -> float:
    """Factor of the peak learning rate at `step`, counted from 0.

    Rises linearly over the first twentieth of the steps, then falls linearly to a tenth.
    """
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)

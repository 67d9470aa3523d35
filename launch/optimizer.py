"""The optimizers of the language models, and their learning rates."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from flash_moe import FlashExperts
from flash_moe.optim import SGD, LazyAdam, RowwiseAdagrad, RowwiseAdam
from flash_moe_dist import parameter_groups

MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)
TableOptimizerName = Literal["adamw", "rowwise-adam", "lazy-adam", "rowwise-adagrad", "sgd"]
# The best in findings/table_optimizers.md.
DEFAULT_TABLE_OPTIMIZER: TableOptimizerName = "rowwise-adagrad"
TABLE_OPTIMIZERS: dict[str, Any] = {
    "rowwise-adam": RowwiseAdam,
    "lazy-adam": LazyAdam,
    "rowwise-adagrad": RowwiseAdagrad,
    "sgd": SGD,
}


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the tables of all expert layers."""
    for module in model.modules():
        if isinstance(module, FlashExperts):
            yield from module.parameters()


def build_optimizers(
    model: nn.Module, lr: float, table_optimizer: TableOptimizerName
) -> list[torch.optim.Optimizer]:
    """Build AdamW for the dense parameters and, if there are any, an optimizer of the tables.

    With "adamw", that is one AdamW of two parameter groups, dense parameters first.
    """
    tables = dict.fromkeys(expert_parameters(model))
    dense = [parameter for parameter in model.parameters() if parameter not in tables]
    groups = parameter_groups(dense)
    if table_optimizer == "adamw":
        groups += parameter_groups(tables)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    ]
    if tables and table_optimizer != "adamw":
        options: dict[str, Any] = {"betas": BETAS} if table_optimizer.endswith("adam") else {}
        optimizers.append(TABLE_OPTIMIZERS[table_optimizer](tables, lr=lr, **options))
    return optimizers


def narrow_tables(model: nn.Module, precision: str, table_optimizer: TableOptimizerName) -> None:
    """Make the tables bfloat16 where activations are, if their optimizer keeps the missing bits.

    model: on the meta device, not sharded yet.
    """
    if precision == "bfloat16" and table_optimizer != "adamw":
        for module in model.modules():
            if isinstance(module, FlashExperts):
                module.to(torch.bfloat16)


def set_learning_rate(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    lr: float,
    table_lr_scale: float,
) -> None:
    """Set the learning rate of the dense parameters, and `table_lr_scale` times it for the tables.

    optimizers: those of `build_optimizers`. Groups hold no factor, as checkpoints save them.
    """
    tables = set(expert_parameters(model))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr * table_lr_scale if group["params"][0] in tables else lr


def learning_rate_factor(step: int, steps: int) -> float:
    """Factor of the peak learning rate at `step`, counted from 0.

    Rises linearly over the first twentieth of the steps, then falls linearly to a tenth.
    """
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)

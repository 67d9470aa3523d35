"""Initial values of tables that do not depend on how a table is sharded."""

import torch
from torch import Tensor

BLOCK_ROWS = 1024


@torch.no_grad()
def normal_rows_(
    table: Tensor,
    std: float,
    first_row: int = 0,
    first_column: int = 0,
    whole: tuple[int, int] | None = None,
) -> None:
    """Fill a table, or a shard of one, with normal values of mean 0.

    Each block of 1024 rows of the whole table is drawn from a seed of its own, so a shard gets the
    values that the whole table would have there. All seeds derive from one number of the CPU's
    default generator: the same on every rank after `torch.manual_seed(seed)`. A table on the meta
    device is not filled, and draws no number.

    Args:
        table: (e, h), rows and columns of the whole table from (first_row, first_column) on.
        std: standard deviation.
        first_row, first_column: where the shard begins in the whole table.
        whole: (E, H), the shape of the whole table; None if `table` is the whole.
    """
    if table.is_meta:
        return
    num_experts, hidden_size = table.shape if whole is None else whole
    base = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    block_rows = min(BLOCK_ROWS, num_experts)
    end = first_row + table.shape[0]
    columns = slice(first_column, first_column + table.shape[1])
    if table.numel() == 0:
        return
    generator = torch.Generator(table.device)
    wide = torch.promote_types(table.dtype, torch.float32)
    values = torch.empty(block_rows, hidden_size, device=table.device, dtype=wide)
    for block in range(first_row // block_rows, -(-end // block_rows)):
        generator.manual_seed((base + block) % 2**63)
        values.normal_(0.0, std, generator=generator)
        begin = block * block_rows
        rows = slice(max(begin, first_row), min(begin + block_rows, end))
        table[rows.start - first_row : rows.stop - first_row].copy_(
            values[rows.start - begin : rows.stop - begin, columns]
        )

"""The expert op as gather and matrix product, differentiated by autograd.

Shares no code with the op: it is the oracle of the tests and a baseline of every benchmark. It
builds two (T, K, H) tensors; avoiding them is what the op is for.
"""

import torch
from torch import Tensor


def naive_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """Compute `triton_flash_expert_func`, from the same arguments; ids of -1 contribute nothing.

    All floating-point arguments must share one dtype, in which everything is computed.
    """
    empty = indices < 0
    # An empty slot reads row 0 with a weight of zero, which gives 0 as long as that row is finite.
    ids = indices.masked_fill(empty, 0).long()
    weights_TK = routing_weights.masked_fill(empty, 0)
    down_TKH, up_TKH = gather_rows(down_weights, ids), gather_rows(up_weights, ids)
    scores_TK = torch.matmul(down_TKH, hidden_states.unsqueeze(-1)).squeeze(-1)
    activations_TK = torch.nn.functional.silu(scores_TK) * weights_TK
    return torch.matmul(activations_TK.unsqueeze(-2), up_TKH).squeeze(-2)


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Gather rows (..., H) of a table (E, H) by ids (...).

    Not by `table[ids]` on CPUs: its gradient adds a row's uses one by one in the table's dtype, and
    stalls in 16 bits (torch 2.13), in bfloat16 at 256 times one use. On GPUs, the gradient of
    `index_select` is the one that adds in the table's dtype.
    """
    if table.is_cpu:
        return table.index_select(0, ids.flatten()).unflatten(0, ids.shape)
    return table[ids]

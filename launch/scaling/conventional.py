"""Baseline: dispatch as for few large experts, which sends a row for every pair.

T local tokens, K experts per token, H hidden size, N = T K pairs of this rank, M pairs received.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.flash_expert import ragged_flash_expert_func
from flash_moe_dist.dispatch.collectives import all_to_all_rows
from flash_moe_dist.dispatch.partition import experts_per_rank

# Buffers with a row for each pair that are allocated at once: two, and one of headroom.
COPIES = 3


@torch.no_grad()
def conventional_expert_func(
    hidden_TH: Tensor,
    down_eH: Tensor,
    up_eH: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """Compute the forward pass of the expert-parallel layer over all ranks of `group`.

    For each pair an all-to-all sends the token's row to the expert's owner, and another returns a
    row of results. The owner uses the same kernels as the layer.

    Args:
        hidden_TH, indices_TK, weights_TK: arguments of `triton_flash_expert_func`, without empty
            slots.
        down_eH, up_eH: rows of the tables that this rank owns.
        num_experts: number of experts of all ranks together.

    Returns:
        (T, H) in the dtype of `hidden_TH`. Results of pairs are rounded to it before the sum.
    """
    num_tokens, slots = indices_TK.shape
    ids_N, ep_size = indices_TK.flatten(), dist.get_world_size(group)
    local_size = experts_per_rank(num_experts, ep_size)
    owner_N, order_N = (ids_N // local_size).sort(stable=True)
    sent_W = torch.bincount(owner_N, minlength=ep_size)
    one_each = [1] * ep_size
    received_W = all_to_all_rows(sent_W, one_each, one_each, group)
    sent, received = torch.stack([sent_W, received_W]).tolist()

    rows_NH = hidden_TH.index_select(0, order_N // slots)
    rows_MH = all_to_all_rows(rows_NH, sent, received, group)
    del rows_NH
    local_ids_N = (ids_N[order_N] - owner_N * local_size).to(torch.int32)
    ids_M = all_to_all_rows(local_ids_N, sent, received, group)
    weights_M = all_to_all_rows(weights_TK.flatten()[order_N], sent, received, group)

    offsets_M1 = torch.arange(len(ids_M) + 1, device=ids_M.device)
    results_MH = ragged_flash_expert_func(rows_MH, down_eH, up_eH, offsets_M1, ids_M, weights_M)
    del rows_MH
    returned_NH = all_to_all_rows(results_MH, received, sent, group)
    del results_MH
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    shape = (num_tokens, slots, hidden_TH.shape[1])
    in_order_TKH = returned_NH.index_select(0, position_N).view(shape)
    del returned_NH
    return in_order_TKH.sum(1)


def bytes_needed(pairs: int, hidden_TH: Tensor) -> int:
    """Peak bytes of a pass that sends or receives this many pairs."""
    return COPIES * pairs * hidden_TH.shape[1] * hidden_TH.element_size()

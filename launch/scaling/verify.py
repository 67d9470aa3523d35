"""Every variant beside what one device computes, before it gets a time."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.bench.cases import LEAVES, Inputs
from flash_moe.bench.measure import LARGEST_ERROR, LARGEST_PEER_ERROR, relative_error
from flash_moe.ops.flash_expert import triton_flash_expert_func
from flash_moe_dist.agreement import same_error_on_all_ranks
from scaling.layer import Layer, rows_of


def results_of_one_device(inputs: Inputs, layer: Layer) -> tuple[Tensor, ...]:
    """What `Layer.results` should give: the op on this rank's tokens with whole tables.

    Gradients of tables are averaged over the ranks.
    """
    ranks, tokens = layer.ranks, layer.tokens
    leaves = tokens.leaves((inputs.leaves[1], inputs.leaves[2]))
    hidden_TH, down_EH, up_EH, weights_TK = leaves
    out_TH = triton_flash_expert_func(hidden_TH, down_EH, up_EH, tokens.indices_TK, weights_TK)
    grads = list(torch.autograd.grad(out_TH, leaves, tokens.grad_TH))
    for place in (1, 2):
        for rank in range(ranks.size):
            part = grads[place][rows_of(layer.num_experts, ranks.size, rank)].float()
            dist.all_reduce(part, group=ranks.group)
            if rank == ranks.rank:
                own_eH = part / ranks.size
        grads[place] = own_eH
    return out_TH.detach(), *grads


def verify(layer: Layer, expected: tuple[Tensor, ...], dispatcher: Any) -> float:
    """The largest relative error on any rank.

    Raises:
        RuntimeError: on all ranks, if it is too large for the dtype, or if a second pass does not
            give the same bits.
    """
    layer.choose(dispatcher)
    first, second = layer.results(), layer.results()
    names = ("output", *(f"gradient of {name}" for name in LEAVES))
    # Either of the two may be so far from the truth.
    limit = 2 * LARGEST_ERROR[layer.tokens.hidden_TH.dtype]
    worst = 0.0
    with same_error_on_all_ranks(layer.ranks.group):
        for name, one, other, exact in zip(names, first, second, expected, strict=True):
            if not torch.equal(one, other):
                raise RuntimeError(f"{dispatcher}: the {name} differs from one pass to the next")
            error = relative_error(one, exact.double()) if exact.any() else float(one.any())
            if not error <= limit:
                raise RuntimeError(f"{dispatcher}: relative error {error:.1e} of the {name}")
            worst = max(worst, error)
    return max(layer.ranks.gather(worst))


def verify_conventional(layer: Layer, expected: tuple[Tensor, ...]) -> float:
    """As `verify`, of the forward pass."""
    with same_error_on_all_ranks(layer.ranks.group):
        error = relative_error(layer.conventional(), expected[0].double())
        if not error <= LARGEST_PEER_ERROR[layer.tokens.hidden_TH.dtype]:
            raise RuntimeError(f"conventional dispatch: relative error {error:.1e} of the output")
    return max(layer.ranks.gather(error))

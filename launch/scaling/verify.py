"""Compare the results of every variant with those of one device, before it is timed."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.bench.cases import Inputs
from flash_moe.bench.measure import (
    EXACT_ELEMENTS,
    MAX_BASELINE_ERROR,
    MAX_ERROR,
    RESULTS,
    relative_error,
)
from flash_moe.ops.flash_expert import triton_flash_expert_func
from flash_moe.ops.naive import naive_expert_func
from flash_moe_dist.agreement import same_error_on_all_ranks
from scaling.conventional import bytes_needed
from scaling.layer import Layer, owned_rows
from scaling.results import CONVENTIONAL, Result
from scaling.traffic import Traffic, busiest

# Tokens of the op on one device that are compared with float64.
EXACT_TOKENS = 64


def results_of_one_device(inputs: Inputs, layer: Layer) -> tuple[Tensor, ...]:
    """Compute what `Layer.results` should return: the op on this rank's tokens with whole tables.

    Gradients of tables are averaged over the ranks and cut to this rank's rows.

    Raises:
        RuntimeError: on all ranks, if the op's output for the first tokens differs from gather and
            matmul in float64.
    """
    ranks, tokens = layer.ranks, layer.tokens
    leaves = tokens.leaves((inputs.leaves[1], inputs.leaves[2]))
    hidden_TH, down_EH, up_EH, weights_TK = leaves
    out_TH = triton_flash_expert_func(hidden_TH, down_EH, up_EH, tokens.indices_TK, weights_TK)
    with same_error_on_all_ranks(ranks.group):
        limit = 2 * MAX_ERROR[hidden_TH.dtype]
        exact = _exact_output(hidden_TH, down_EH, up_EH, tokens.indices_TK, weights_TK)
        _checked_error("one device: output", out_TH.detach()[: len(exact)], exact, limit)
    grads = list(torch.autograd.grad(out_TH, leaves, tokens.grad_TH))
    for table in (1, 2):
        for rank in range(ranks.size):
            shard = grads[table][owned_rows(layer.num_experts, ranks.size, rank)].float()
            dist.all_reduce(shard, group=ranks.group)
            if rank == ranks.rank:
                own_eH = shard / ranks.size
        grads[table] = own_eH
    return out_TH.detach(), *grads


@torch.no_grad()
def _exact_output(
    hidden_TH: Tensor, down_EH: Tensor, up_EH: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Compute the output of the first tokens in float64, from the table rows that they use."""
    some = slice(0, EXACT_TOKENS)
    used, ids = indices_TK[some].clamp(min=0).unique(return_inverse=True)
    return naive_expert_func(
        hidden_TH[some].double(),
        down_EH[used].double(),
        up_EH[used].double(),
        ids.masked_fill(indices_TK[some] < 0, -1),
        weights_TK[some].double(),
    )


def verify_all(
    layer: Layer, expected: tuple[Tensor, ...], variants: list[str], traffic: Traffic
) -> dict[str, Result]:
    """Verify every variant; return results that have an error, or the reason for a failure.

    Raises:
        RuntimeError: see `verify`.
    """
    results = {name: Result() for name in variants}
    for name, result in results.items():
        if name == CONVENTIONAL:
            result.failure = why_not_conventional(layer, traffic)
            if not result.failure:
                result.error = verify_conventional(layer, expected)
        else:
            result.error = verify(layer, expected, name)
        layer.clear()
    return results


def why_not_conventional(layer: Layer, traffic: Traffic) -> str:
    """Say why the conventional dispatch does not fit into some rank's memory; empty if it does."""
    needed = bytes_needed(int(busiest(traffic.pairs_WW)), layer.tokens.hidden_TH)
    if layer.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    else:
        # All ranks of a host share its memory.
        free = _available_bytes() // layer.ranks.size
    if needed > 0.9 * min(layer.ranks.gather(free)):
        return f"left out: rows of all pairs take {needed / 1e9:.1f} GB on each rank"
    return ""


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def verify(layer: Layer, expected: tuple[Tensor, ...], dispatcher: Any) -> float:
    """Run the layer twice and return the largest relative error on any rank.

    Raises:
        RuntimeError: on all ranks, if the error of a result, or of a row of it, is above the limit
            of the dtype, or if the two runs differ in any bit.
    """
    layer.choose(dispatcher)
    first, second = layer.results(), layer.results()
    # Twice, because the result of one device may have an error too.
    limit = 2 * MAX_ERROR[layer.tokens.hidden_TH.dtype]
    with same_error_on_all_ranks(layer.ranks.group):
        for name, one, other in zip(RESULTS, first, second, strict=True):
            if not torch.equal(one, other):
                raise RuntimeError(f"{dispatcher}: the {name} differs from one pass to the next")
        worst = max(
            _checked_error(f"{dispatcher}: {name}", one, exact, limit)
            for name, one, exact in zip(RESULTS, first, expected, strict=True)
        )
    return max(layer.ranks.gather(worst))


def verify_conventional(layer: Layer, expected: tuple[Tensor, ...]) -> float:
    """Run the conventional dispatch and return the largest relative error on any rank.

    Runs once only: this baseline rounds the result of each pair, and is not bitwise repeatable.

    Raises:
        RuntimeError: on all ranks, if the error is above the limit of the dtype.
    """
    out_TH = layer.conventional()
    limit = MAX_BASELINE_ERROR[layer.tokens.hidden_TH.dtype]
    with same_error_on_all_ranks(layer.ranks.group):
        error = _checked_error("conventional dispatch: output", out_TH, expected[0], limit)
    return max(layer.ranks.gather(error))


def _checked_error(what: str, result: Tensor, exact: Tensor, limit: float) -> float:
    if not exact.any():
        error = row_error = float(result.abs().max()) if result.numel() else 0.0
    else:
        error, row_error = relative_error(result, exact), largest_row_error(result, exact)
    if not error <= limit:
        raise RuntimeError(f"{what} has a relative error of {error:.1e}")
    if not row_error <= limit:
        raise RuntimeError(f"{what} has a row with a relative error of {row_error:.1e}")
    return error


def largest_row_error(result: Tensor, exact: Tensor) -> float:
    """Largest distance between a row and its row of `exact`, relative to the norm of the latter.

    Rows below the root mean square norm are compared with that norm instead. Finds a single wrong
    row, which would hardly change the relative error of a whole table.
    """
    rows = max(1, EXACT_ELEMENTS[exact.device.type] // exact.shape[1])
    chunks = list(zip(result.split(rows), exact.split(rows), strict=True))
    mean_square = sum(exact_chunk.double().square().sum() for _, exact_chunk in chunks) / len(exact)
    squares = [
        (chunk.double() - exact_chunk.double()).square().sum(1)
        / exact_chunk.double().square().sum(1).clamp(min=mean_square)
        for chunk, exact_chunk in chunks
    ]
    return float(torch.cat(squares).max().sqrt())

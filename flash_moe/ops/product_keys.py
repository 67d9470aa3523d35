"""The K best of all sums of two keys' scores, without computing all sums: a custom op.

T tokens, A and B keys of the two axes, K sums chosen. With the scores of both axes sorted, at least
(i + 1)(j + 1) - 1 sums are no worse than that of ranks (i, j), counted from 0, so only ranks with
(i + 1)(j + 1) <= K can be among the K best: C of them, about K ln K. (Product keys: Lample et al.
2019, arXiv:1907.05242.)
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe.arguments import FLOAT_DTYPES, checked_int
from flash_moe.ops.backend_choice import check_backend, default_backend, uses_triton
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.input_checks import check_dtype, check_ndim
from flash_moe.ops.observation import is_observed
from flash_moe.ops.product_keys_cpu import choose_on_cpu
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2

# Of an id below a packed score.
ID_BITS = 0x7FFFFFFF
# Numbers in a block of a kernel, and the most that fit into its registers.
BLOCK_NUMBERS, MAX_BLOCK = 256, 2**16
# Keys and candidates of a warp: up to these, one kernel does all, so that launches are few.
MAX_FUSED = 1024
# Candidates of all tokens that are held at a time where PyTorch's operations choose.
MAX_CANDIDATES_HELD = 2**24

PairOp = Callable[..., tuple[Tensor, Tensor]]


class ChosenKeys(NamedTuple):
    """The best sums of each token, best first: indices (T, K) int64 and scores (T, K)."""

    indices: Tensor
    scores: Tensor


def product_key_topk(
    first_scores: Tensor,
    second_scores: Tensor,
    k: int,
    *,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
) -> ChosenKeys:
    """Choose, for each token, the k best of all sums of a first and a second score.

    Sums are compared in float32 (float64 if the scores are), biases included; of equal sums the
    lowest index is better. Results are bitwise repeatable.

    Args:
        first_scores: (T, A), a float dtype.
        second_scores: (T, B) in the same dtype.
        k: number of sums, in [1, A B].
        first_bias, second_bias: (A,) and (B,), a float dtype; added to the scores for the choice
            and the order only. They get no gradient.

    Returns:
        `ChosenKeys`: indices i * B + j of the chosen sums, best first, and scores, the sums without
        the biases in float32 (float64 if the scores are). Gradients of the scores flow to both axes
        in their dtype, summed in that of the scores.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or device does not fit, k is out of range, A B exceeds 2^31 - 1, or the
            backend in FLASH_MOE_BACKEND does not take these tensors.
        RuntimeError: a second derivative was requested.
    """
    k = _check(first_scores, second_scores, k, first_bias, second_bias)
    plain = type(first_scores) is Tensor and type(second_scores) is Tensor
    plain = plain and not first_scores.is_meta and not is_observed()
    func = _EagerTopk.apply if plain else _topk_op
    scores, indices = func(first_scores, second_scores, k, first_bias, second_bias)
    return ChosenKeys(indices, scores)


@cache
def candidate_ranks(k: int, num_first: int, num_second: int) -> list[tuple[int, int]]:
    """List all ranks (i, j) in two sorted lists with (i + 1)(j + 1) <= k.

    With k = 3 and long lists: (0, 0), (0, 1), (0, 2), (1, 0), (2, 0).
    """
    return [(i, j) for i in range(min(k, num_first)) for j in range(min(k // (i + 1), num_second))]


@cache
def _candidates(k: int, num_first: int, num_second: int, device: torch.device) -> Tensor:
    """Candidate ranks, (2, C) int32."""
    ranks = torch.tensor(candidate_ranks(k, num_first, num_second), dtype=torch.int32, device="cpu")
    return ranks.t().contiguous().to(device)


def _choose_best(
    first_TA: Tensor,
    second_TB: Tensor,
    k: int,
    first_bias_A: Tensor | None,
    second_bias_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return scores and indices of `ChosenKeys`: PyTorch's opcheck takes no int tensor first."""
    wide = accumulator_dtype(first_TA.dtype)
    first_bias_A, second_bias_B = (
        None if bias is None else bias.detach().to(wide) for bias in (first_bias_A, second_bias_B)
    )
    with torch.no_grad():
        if _has_kernels(first_TA) and _fits_kernels(first_TA.shape[1], second_TB.shape[1], k):
            return _choose_in_kernels(first_TA, second_TB, k, first_bias_A, second_bias_B)
        first, second = first_TA.to(wide), second_TB.to(wide)
        sums_TK, indices_TK = _choose(first, second, first_bias_A, second_bias_B, k)
        if first_bias_A is None and second_bias_B is None:
            return sums_TK, indices_TK
        first_keys_TK = indices_TK // second.shape[1]
        second_keys_TK = indices_TK - first_keys_TK * second.shape[1]
        return first.gather(1, first_keys_TK) + second.gather(1, second_keys_TK), indices_TK


def _fake_best(
    first_TA: Tensor,
    second_TB: Tensor,
    k: int,
    first_bias_A: Tensor | None,
    second_bias_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (first_TA.shape[0], k)
    scores_TK = first_TA.new_empty(shape, dtype=accumulator_dtype(first_TA.dtype))
    return scores_TK, first_TA.new_empty(shape, dtype=torch.int64)


def _axis_grads(
    score_grads_TK: Tensor,
    indices_TK: Tensor,
    num_first: int,
    num_second: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the gradients (T, A) and (T, B) of the scores of both axes, in `dtype`."""
    num_tokens, k = indices_TK.shape
    # The kernel keeps a slot in 16 bits.
    if not uses_triton(default_backend(indices_TK.device)) or k > 2**16:
        first_TK = indices_TK // num_second
        # Cheaper than the remainder of a second division.
        second_TK = indices_TK - first_TK * num_second
        sums_TA = score_grads_TK.new_zeros(num_tokens, num_first)
        sums_TB = score_grads_TK.new_zeros(num_tokens, num_second)
        sums_TA.scatter_add_(1, first_TK, score_grads_TK)
        sums_TB.scatter_add_(1, second_TK, score_grads_TK)
        return sums_TA.to(dtype), sums_TB.to(dtype)
    import triton.language as tl

    from flash_moe.ops.product_keys_kernels import axis_grads_kernel

    first_TA = score_grads_TK.new_empty(num_tokens, num_first, dtype=dtype)
    second_TB = score_grads_TK.new_empty(num_tokens, num_second, dtype=dtype)
    if num_tokens == 0:
        return first_TA, second_TB
    most_keys = max(num_first, num_second)
    block = _Block.of(k, num_tokens, indices_TK.device)
    launch(
        axis_grads_kernel,
        (cdiv(num_tokens, block.tokens), 2),
        score_grads_TK.contiguous(),
        indices_TK,
        first_TA,
        second_TB,
        num_tokens,
        num_first,
        num_second,
        k,
        PACKED=tl.int32 if most_keys < 2**15 else tl.int64,
        BLOCK_T=block.tokens,
        BLOCK_K=block.numbers,
        BLOCK_KEYS=next_power_of_2(most_keys),
        num_warps=block.warps,
    )
    return first_TA, second_TB


def _fake_grads(
    score_grads_TK: Tensor,
    indices_TK: Tensor,
    num_first: int,
    num_second: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    num_tokens = indices_TK.shape[0]
    return (
        score_grads_TK.new_empty(num_tokens, num_first, dtype=dtype),
        score_grads_TK.new_empty(num_tokens, num_second, dtype=dtype),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    first_TA, second_TB, *_ = inputs
    _, indices_TK = output
    ctx.mark_non_differentiable(indices_TK)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices_TK)
    ctx.sizes, ctx.dtype = (first_TA.shape[1], second_TB.shape[1]), first_TA.dtype


def _backward(ctx: Any, score_grads_TK: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return _input_grads(_backward_op, ctx, score_grads_TK)


def _input_grads(
    func: PairOp, ctx: Any, score_grads_TK: Tensor | None
) -> tuple[Tensor | None, ...]:
    if score_grads_TK is None:
        return (None,) * 5
    (indices_TK,) = ctx.saved_tensors
    grads = func(score_grads_TK, indices_TK, *ctx.sizes, ctx.dtype)
    return (*grads, None, None, None)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "product_key_topk has no second derivative: its gradient was differentiated "
        "(create_graph=True, then backward again)"
    )


class _EagerTopk(torch.autograd.Function):
    """The same without the ops, whose dispatch takes half of the host's time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _choose_best(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, score_grads_TK: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        func = _backward_op if torch.is_grad_enabled() or is_observed() else _axis_grads
        return _input_grads(func, ctx, score_grads_TK)


# `torch.library.custom_op` also checks at each call that nothing is mutated.
_LIBRARY = torch.library.Library("flash_moe", "FRAGMENT")


def _define(
    schema: str,
    func: PairOp,
    fake: PairOp,
    backward: Callable[..., tuple[Tensor | None, ...] | None],
    setup_context: Callable[..., None] | None = None,
) -> PairOp:
    name = f"flash_moe::{schema.partition('(')[0]}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, func, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.flash_moe, name.partition("::")[2]).default


_topk_op = _define(
    "product_key_topk(Tensor first, Tensor second, SymInt k, Tensor? first_bias, "
    "Tensor? second_bias) -> (Tensor, Tensor)",
    _choose_best,
    _fake_best,
    _backward,
    _save_for_backward,
)
_backward_op = _define(
    "product_key_topk_backward(Tensor score_grads, Tensor indices, SymInt num_first, "
    "SymInt num_second, ScalarType dtype) -> (Tensor, Tensor)",
    _axis_grads,
    _fake_grads,
    _refuse,
)


def _has_kernels(scores: Tensor) -> bool:
    return uses_triton(default_backend(scores.device)) and scores.dtype != torch.float64


def _fits_kernels(num_first: int, num_second: int, k: int) -> bool:
    """Whether candidates and sorted keys fit into the registers of a program."""
    num_candidates = len(candidate_ranks(k, num_first, num_second))
    return max(num_first, num_second, num_candidates) <= MAX_BLOCK


class _Block(NamedTuple):
    """Tokens and numbers of each in a block of a kernel, and warps for it."""

    tokens: int
    numbers: int
    warps: int

    @classmethod
    def of(cls, numbers: int, tokens: int, device: torch.device) -> "_Block":
        numbers = next_power_of_2(numbers)
        # Triton's interpreter takes as long for a program whatever its size.
        block = BLOCK_NUMBERS if device.type == "cuda" else MAX_BLOCK
        # Sorting and counting within a warp exchange no shared memory.
        warps = 1 if numbers <= 1024 else min(32, numbers // 512)
        return cls(min(next_power_of_2(tokens), max(1, block // numbers)), numbers, warps)


def _choose_in_kernels(
    first_TA: Tensor,
    second_TB: Tensor,
    k: int,
    first_bias_A: Tensor | None,
    second_bias_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from flash_moe.ops import product_keys_kernels as kernels

    num_tokens, device = first_TA.shape[0], first_TA.device
    indices_TK = torch.empty(num_tokens, k, dtype=torch.int64, device=device)
    scores_TK = torch.empty(num_tokens, k, dtype=torch.float32, device=device)
    if num_tokens == 0:
        return scores_TK, indices_TK
    first, second = _with_dense_rows(first_TA), _with_dense_rows(second_TB)
    first_size, second_size = first.shape[1], second.shape[1]
    num_first, num_second = min(k, first_size), min(k, second_size)
    shape = (num_tokens, num_first + num_second)
    best_scores = torch.empty(shape, dtype=torch.float32, device=device)
    best_keys = torch.empty(shape, dtype=torch.int32, device=device)
    candidates = _candidates(k, first_size, second_size, device)
    num_candidates = candidates.shape[1]
    strides = (first.stride(0), second.stride(0))
    axes = (
        first,
        second,
        # Not read without a bias.
        first if first_bias_A is None else first_bias_A.contiguous(),
        second if second_bias_B is None else second_bias_B.contiguous(),
        best_scores,
        best_keys,
        num_tokens,
        *strides,
        first_size,
        second_size,
        num_first,
        num_second,
    )
    keys_block = _Block.of(max(first_size, second_size), num_tokens, device)
    keys_options = {
        "HAS_FIRST_BIAS": first_bias_A is not None,
        "HAS_SECOND_BIAS": second_bias_B is not None,
        "BLOCK_KEYS": keys_block.numbers,
        "BLOCK_BEST": next_power_of_2(max(num_first, num_second)),
    }
    block = _Block.of(num_candidates, num_tokens, device)
    if max(keys_block.numbers, block.numbers) <= MAX_FUSED:
        launch(
            kernels.fused_choice_kernel,
            (cdiv(num_tokens, block.tokens),),
            *axes,
            indices_TK,
            scores_TK,
            candidates,
            num_candidates,
            k,
            **keys_options,
            BLOCK_T=block.tokens,
            BLOCK_CANDIDATES=block.numbers,
            BLOCK_K=next_power_of_2(k),
            num_warps=block.warps,
        )
        return scores_TK, indices_TK
    launch(
        kernels.best_keys_kernel,
        (cdiv(num_tokens, keys_block.tokens), 2),
        *axes,
        **keys_options,
        BLOCK_T=keys_block.tokens,
        num_warps=keys_block.warps,
    )
    launch(
        kernels.choose_kernel,
        (cdiv(num_tokens, block.tokens),),
        indices_TK,
        best_scores,
        best_keys,
        candidates,
        num_tokens,
        num_first,
        num_second,
        num_candidates,
        second_size,
        k,
        BLOCK_T=block.tokens,
        BLOCK_CANDIDATES=block.numbers,
        num_warps=block.warps,
    )
    block = _Block.of(k, num_tokens, device)
    launch(
        kernels.order_kernel,
        (cdiv(num_tokens, block.tokens),),
        indices_TK,
        first,
        second,
        scores_TK,
        num_tokens,
        *strides,
        second_size,
        k,
        BLOCK_T=block.tokens,
        BLOCK_K=block.numbers,
        num_warps=block.warps,
    )
    return scores_TK, indices_TK


def _with_dense_rows(scores: Tensor) -> Tensor:
    return scores if scores.stride(1) == 1 else scores.contiguous()


def _choose(
    first_TA: Tensor,
    second_TB: Tensor,
    first_bias_A: Tensor | None,
    second_bias_B: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Return the best sums, biases included, and their indices: (T, K), best first."""
    ranks_2C = _candidates(k, first_TA.shape[1], second_TB.shape[1], first_TA.device)
    if default_backend(first_TA.device) == "torch_sparse":
        return choose_on_cpu(first_TA, second_TB, first_bias_A, second_bias_B, ranks_2C, k)
    rows = max(1, MAX_CANDIDATES_HELD // ranks_2C.shape[1])
    chunks = zip(
        _biased(first_TA, first_bias_A).split(rows),
        _biased(second_TB, second_bias_B).split(rows),
        strict=True,
    )
    sums, indices = zip(*(_choose_by_sorting(*chunk, ranks_2C, k) for chunk in chunks), strict=True)
    return torch.cat(sums), torch.cat(indices)


def _biased(scores: Tensor, bias: Tensor | None) -> Tensor:
    return scores if bias is None else scores + bias


def _choose_by_sorting(
    first_TA: Tensor, second_TB: Tensor, ranks_2C: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Choose in operations of PyTorch that every device has."""
    (first, first_keys), (second, second_keys) = (
        axis.sort(dim=1, descending=True, stable=True) for axis in (first_TA, second_TB)
    )
    first_ranks, second_ranks = ranks_2C
    sums_TC = first.index_select(1, first_ranks)
    sums_TC += second.index_select(1, second_ranks)
    ids_TC = first_keys.index_select(1, first_ranks) * second_TB.shape[1]
    ids_TC += second_keys.index_select(1, second_ranks)
    # By id, so that a stable sort leaves equal sums in that order.
    ids_TC, order_TC = ids_TC.sort(dim=1)
    sums_TK, order_TC = sums_TC.gather(1, order_TC).sort(dim=1, descending=True, stable=True)
    return sums_TK[:, :k], ids_TC.gather(1, order_TC[:, :k])


def _check(
    first_scores: Tensor,
    second_scores: Tensor,
    k: int,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
) -> int:
    named = {"first_scores": first_scores, "second_scores": second_scores}
    biases = {"first_bias": first_bias, "second_bias": second_bias}
    for name, scores in named.items():
        check_dtype(name, scores, FLOAT_DTYPES)
        check_ndim(name, scores, 2, "(num_tokens, number of keys)")
    if second_scores.dtype != first_scores.dtype:
        raise TypeError(
            f"second_scores must have the dtype of first_scores, {first_scores.dtype}, got "
            f"{second_scores.dtype}"
        )
    if second_scores.shape[0] != first_scores.shape[0]:
        raise ValueError(
            f"second_scores must have one row for each of the {first_scores.shape[0]} rows of "
            f"first_scores, got shape {tuple(second_scores.shape)}"
        )
    for (name, bias), scores in zip(biases.items(), named.values(), strict=True):
        if bias is None:
            continue
        check_dtype(name, bias, FLOAT_DTYPES)
        if bias.shape != scores.shape[1:]:
            raise ValueError(
                f"{name} must have shape ({scores.shape[1]},), one number for each key, got "
                f"{tuple(bias.shape)}"
            )
    given = named | {name: bias for name, bias in biases.items() if bias is not None}
    for name, tensor in given.items():
        if tensor.device != first_scores.device:
            raise ValueError(
                f"{name} must be on {first_scores.device}, where first_scores is, got "
                f"{tensor.device}"
            )
    check_backend(default_backend(first_scores.device), first_scores.device)
    num_sums = first_scores.shape[1] * second_scores.shape[1]
    if num_sums > ID_BITS:
        raise ValueError(
            f"first_scores and second_scores must have at most {ID_BITS} sums, got "
            f"{first_scores.shape[1]} x {second_scores.shape[1]}"
        )
    k = checked_int("k", k, 1)
    if k > num_sums:
        raise ValueError(f"k must be at most the number of sums, {num_sums}, got {k}")
    return k

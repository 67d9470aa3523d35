"""The formulas of the expert op over three primitives, forward and backward, without autograd.

T tokens, H hidden size, E experts, K experts per token, N (token, expert) pairs; an expert is
one row d of `down_weights` and one row u of `up_weights`, g its routing weight for a token.

    forward    s = <x, d>       a = silu(s) g      y = sum over the token's experts of a u
    backward   da = <dy, u>     dg = da silu(s)    ds = da g silu'(s)
               dx = sum of ds d over the token's experts
               dd = sum of ds x and du = sum of a dy over the expert's tokens

Every dot product is an `sddmm`, every sum for tokens an `spmm`, every sum for experts an
`spmm_t` (see `flash_moe.ops.backends`). The scores s are kept for the backward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_moe.ops.activation import activate, activate_backward
from flash_moe.ops.backend_choice import MIN_PAIRS_FOR_SIDE_STREAM, TRITON_BACKENDS, hot_threshold
from flash_moe.ops.backends import gather, load_backend
from flash_moe.ops.hot_experts import (
    HotPairs,
    most_hot_experts,
    set_hot_apart,
    workspace_size,
    zero_counts,
)
from flash_moe.ops.indices import check_and_sort, check_ragged
from flash_moe.ops.overlap import InputChunk, OutputChunk
from flash_moe.ops.pairs import Pairs

# Scores (N,), and what the pattern is made of: ids, their order, row offsets, workspace.
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    ids: Tensor,
    row_offsets: Tensor | None,
    weights: Tensor,
    backend: str,
    out_dtype: torch.dtype,
    checked: bool = False,
    mean_pairs: int | None = None,
    rows_in: Sequence[InputChunk] = (),
    rows_out: Sequence[OutputChunk] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (T, H) in `out_dtype`, and after it the five tensors that `Backward` wants kept.

    Args:
        ids, weights: (T, K); with row_offsets (T + 1,): (N,).
        checked: ids (N,) int32 and row_offsets int64 are known to be right; ids and weights may
            go on after the last row's.
        mean_pairs: of a token with row_offsets, for the shape of kernels; None: as there are.
        rows_in: parts of hidden_TH that are there one after the other; none: all are there.
        rows_out: parts of the output, which is then empty; with row_offsets and "gather" only.
    """
    num_experts = down_EH.shape[0]
    hot = None
    num_tokens, slots = hidden_TH.shape[0], slots_of(ids)
    size = size_of_workspace(num_tokens, slots, num_experts, backend)
    workspace = ids.new_empty(size, dtype=torch.int32)
    if row_offsets is None:
        counts_E = None
        if workspace.shape[0] > 0:
            hot = _hot_pairs(num_tokens, slots, num_experts, workspace)
            counts_E = zero_counts(hot)
        ids_N, order_N = check_and_sort(ids, num_experts, backend in TRITON_BACKENDS, counts_E)
        if hot is not None:
            set_hot_apart(hot, ids_N, order_N, slots, hot_threshold(num_tokens))
        offsets = ids.new_empty(0, dtype=torch.int64)
    else:
        order_N = ids.new_empty(0, dtype=torch.int32)
        offsets, ids_N = row_offsets, ids
        if not checked:
            in_kernels = backend in TRITON_BACKENDS
            offsets, ids_N = check_ragged(row_offsets, ids, num_experts, in_kernels)
    pairs = _pairs(ids_N, offsets, num_tokens, slots, num_experts, hot, mean_pairs)
    scores_N = _sddmm(backend, hidden_TH, down_EH, pairs, rows_in)
    activations_N = activate(
        scores_N, weights.reshape(-1), order_N, in_kernels=backend in TRITON_BACKENDS
    )
    out_TH = _spmm(backend, activations_N, up_EH, pairs, out_dtype, rows_out)
    return out_TH, scores_N, ids_N, order_N, offsets, workspace


class Backward:
    """The backward pass in two steps: gradients of the tokens, then of the tables.

    In two, so that the first can travel between ranks while the second is computed.

    Args:
        grad_TH: gradient of the output, in any float dtype.
        hidden_TH, down_EH, up_EH, weights, backend: as `forward` had them.
        kept: as `forward` returned them.
        slots: `slots_of` the ids.
        needed: which gradients are asked for: hidden states, down, up, routing weights.
        mean_pairs: as `forward` had it.
        rows_in: as of `forward`, parts of grad_TH.
    """

    def __init__(
        self,
        grad_TH: Tensor,
        hidden_TH: Tensor,
        down_EH: Tensor,
        up_EH: Tensor,
        weights: Tensor,
        kept: Kept,
        slots: int,
        needed: Sequence[bool],
        backend: str,
        mean_pairs: int | None = None,
        rows_in: Sequence[InputChunk] = (),
    ) -> None:
        scores_N, ids_N, order_N, offsets, workspace = kept
        num_tokens, num_experts = hidden_TH.shape[0], down_EH.shape[0]
        self.rows_2TH = (hidden_TH, grad_TH)
        self.tables = (down_EH, up_EH)
        self.hidden_needed, self.down_needed, self.up_needed, weights_needed = needed
        self.backend, self.primitives = backend, load_backend(backend)
        hot = None
        if workspace.shape[0] > 0:
            hot = _hot_pairs(num_tokens, slots, num_experts, workspace)
        self.pairs = _pairs(ids_N, offsets, num_tokens, slots, num_experts, hot, mean_pairs)
        scores_needed = self.hidden_needed or self.down_needed
        # Kernels that leave much of the device unused, beside some that wait for memory.
        by_expert = backend in ("gather", "hot_cold") and (self.down_needed or self.up_needed)
        sorts_aside = by_expert and self.pairs.num_pairs >= MIN_PAIRS_FOR_SIDE_STREAM
        self.sorting = None
        if sorts_aside:
            self.sorting = self.pairs.start_expert_sort(
                gather.tokens_by_expert if slots < 0 else None
            )
        activation_grads_N = None
        if scores_needed or weights_needed:
            activation_grads_N = _sddmm(backend, grad_TH, up_EH, self.pairs, rows_in)
        else:
            _wait(rows_in)
        self.score_grads_N, self.activations_N, weights_grad_N = activate_backward(
            activation_grads_N,
            scores_N,
            weights.reshape(-1),
            order_N,
            (scores_needed, self.up_needed, weights_needed),
            in_kernels=backend in TRITON_BACKENDS,
        )
        self.weights_grad = None if weights_grad_N is None else weights_grad_N.view(weights.shape)

    def for_tokens(
        self, hidden_dtype: torch.dtype, rows_out: Sequence[OutputChunk] = ()
    ) -> Tensor | None:
        """Gradients of hidden states, in that dtype; None if not needed.

        rows_out: as of `forward`.
        """
        if not self.hidden_needed or self.score_grads_N is None:
            return None
        return _spmm(
            self.backend, self.score_grads_N, self.tables[0], self.pairs, hidden_dtype, rows_out
        )

    def for_tables(self, scale: float) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the down and the up table, times `scale`; None if not needed."""
        if self.sorting is not None:
            self.pairs.wait_expert_sort(self.sorting)
        down_EH, up_EH = self.tables
        hidden_TH, grad_TH = self.rows_2TH
        down_values_N = self.score_grads_N if self.down_needed else None
        up_values_N = self.activations_N if self.up_needed else None
        if down_values_N is not None and up_values_N is not None:
            return self.primitives.spmm_t_both(
                (down_values_N, up_values_N),
                self.rows_2TH,
                self.pairs,
                (down_EH.dtype, up_EH.dtype),
                scale,
            )
        down_grad = up_grad = None
        if down_values_N is not None:
            down_grad = self.primitives.spmm_t(
                down_values_N, hidden_TH, self.pairs, down_EH.dtype, scale
            )
        if up_values_N is not None:
            up_grad = self.primitives.spmm_t(up_values_N, grad_TH, self.pairs, up_EH.dtype, scale)
        return down_grad, up_grad


def _wait(rows_in: Sequence[InputChunk]) -> None:
    for part in rows_in:
        part.wait()


def _sddmm(
    backend: str, rows_TH: Tensor, table_EH: Tensor, pairs: Pairs, rows_in: Sequence[InputChunk]
) -> Tensor:
    if len(rows_in) > 1 and backend == "gather":
        return gather.sddmm(rows_TH, table_EH, pairs, rows_in)
    _wait(rows_in)
    return load_backend(backend).sddmm(rows_TH, table_EH, pairs)


def _spmm(
    backend: str,
    values_N: Tensor,
    table_EH: Tensor,
    pairs: Pairs,
    out_dtype: torch.dtype,
    rows_out: Sequence[OutputChunk],
) -> Tensor:
    if not rows_out:
        return load_backend(backend).spmm(values_N, table_EH, pairs, out_dtype)
    assert backend == "gather"
    gather.spmm_into(values_N, table_EH, pairs, rows_out)
    return table_EH.new_empty(0, dtype=out_dtype)


def slots_of(ids: Tensor) -> int:
    """K of ids (T, K); -1 for ragged rows."""
    return ids.shape[1] if ids.ndim == 2 else -1


def size_of_workspace(num_tokens: int, slots: int, num_experts: int, backend: str) -> int:
    """Elements that setting hot pairs apart takes; 0 where none are set apart."""
    if slots <= 0 or backend != "hot_cold":
        return 0
    most = most_hot_experts(num_tokens * slots, num_experts, hot_threshold(num_tokens))
    return workspace_size(num_tokens, num_experts, most)


def _pairs(
    ids_N: Tensor,
    offsets: Tensor,
    num_tokens: int,
    slots: int,
    num_experts: int,
    hot: HotPairs | None,
    mean_pairs: int | None,
) -> Pairs:
    if slots > 0:
        return Pairs(None, ids_N, num_experts, slots, hot)
    if slots == 0:
        offsets = offsets.new_zeros(num_tokens + 1)
    return Pairs(offsets, ids_N, num_experts, given_mean_pairs=mean_pairs)


def _hot_pairs(num_tokens: int, slots: int, num_experts: int, workspace: Tensor) -> HotPairs:
    most = most_hot_experts(num_tokens * slots, num_experts, hot_threshold(num_tokens))
    return HotPairs.in_workspace(workspace, num_tokens, num_experts, most)

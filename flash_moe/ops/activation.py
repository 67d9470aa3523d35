"""Elementwise step between the primitives: a = silu(s) g for each pair, and its derivatives.

N pairs. `slot_order` (N,) is the position of each pair in `weights`, which are in the caller's
order; None: pairs are in that order, too. The torch form serves every device; the Triton form takes
fewer passes over the pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_moe.ops.activation_kernels import activate_backward_kernel, activate_kernel
from flash_moe.ops.triton_launch import cdiv, launch

BLOCK = 1024


class ScoreGrads(NamedTuple):
    """What the backward pass computes for each pair; None where it is not needed.

    scores: (N,) gradients of the scores.
    activations: (N,) silu(s) g, computed again.
    weights: gradients of the routing weights, with their shape, dtype and order.
    """

    scores: Tensor | None
    activations: Tensor | None
    weights: Tensor | None


def activate(
    scores_N: Tensor, weights: Tensor, slot_order: Tensor | None, in_kernels: bool
) -> Tensor:
    """Compute silu(s) g: (N,) in the dtype of the scores.

    Args:
        scores_N: (N,).
        weights: routing weights in any shape of N elements or more.
        slot_order: see the top of this file.
        in_kernels: use Triton kernels.
    """
    weights_N = weights.reshape(-1)
    if not in_kernels:
        return torch.nn.functional.silu(scores_N).mul_(weights_N)
    activations_N = torch.empty_like(scores_N)
    if scores_N.numel() > 0:
        launch(
            activate_kernel,
            (cdiv(scores_N.numel(), BLOCK),),
            scores_N,
            weights_N.contiguous(),
            scores_N if slot_order is None else slot_order,
            activations_N,
            scores_N.numel(),
            HAS_ORDER=slot_order is not None,
            BLOCK=BLOCK,
        )
    return activations_N


def activate_backward(
    activation_grads_N: Tensor | None,
    scores_N: Tensor,
    weights: Tensor,
    slot_order: Tensor | None,
    in_kernels: bool,
    *,
    scores_needed: bool,
    activations_needed: bool,
    weights_needed: bool,
) -> ScoreGrads:
    """Compute those of `ScoreGrads` that are needed.

    Args:
        activation_grads_N: (N,), or None where only the activations are needed.
        scores_N, weights, slot_order, in_kernels: arguments of `activate`.
    """
    if not in_kernels:
        return _activate_backward(
            activation_grads_N, scores_N, weights, scores_needed, activations_needed, weights_needed
        )
    score_grads_N = torch.empty_like(scores_N) if scores_needed else None
    activations_N = torch.empty_like(scores_N) if activations_needed else None
    weight_grads = weights.new_empty(weights.shape) if weights_needed else None
    if scores_N.numel() > 0 and (scores_needed or activations_needed or weights_needed):
        launch(
            activate_backward_kernel,
            (cdiv(scores_N.numel(), BLOCK),),
            scores_N if activation_grads_N is None else activation_grads_N,
            scores_N,
            weights.contiguous(),
            scores_N if slot_order is None else slot_order,
            scores_N if score_grads_N is None else score_grads_N,
            scores_N if activations_N is None else activations_N,
            weights if weight_grads is None else weight_grads,
            scores_N.numel(),
            HAS_ORDER=slot_order is not None,
            SCORES_NEEDED=scores_needed,
            ACTIVATIONS_NEEDED=activations_needed,
            WEIGHTS_NEEDED=weights_needed,
            BLOCK=BLOCK,
        )
    return ScoreGrads(score_grads_N, activations_N, weight_grads)


def _activate_backward(
    activation_grads_N: Tensor | None,
    scores_N: Tensor,
    weights: Tensor,
    scores_needed: bool,
    activations_needed: bool,
    weights_needed: bool,
) -> ScoreGrads:
    weights_N = weights.reshape(-1)
    sigmoid_N = torch.sigmoid(scores_N)
    silu_N = scores_N * sigmoid_N
    score_grads_N = weight_grads = None
    if activation_grads_N is not None and weights_needed:
        weight_grads = (activation_grads_N * silu_N).to(weights.dtype).view(weights.shape)
    if activation_grads_N is not None and scores_needed:
        # silu'(s) = sigma (1 + s (1 - sigma)): other forms cancel for large s.
        slope_N = (1 - sigmoid_N).mul_(scores_N).add_(1).mul_(sigmoid_N)
        score_grads_N = (activation_grads_N * weights_N).mul_(slope_N)
    activations_N = silu_N.mul_(weights_N) if activations_needed else None
    return ScoreGrads(score_grads_N, activations_N, weight_grads)

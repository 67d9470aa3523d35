"""What happens to each pair between the primitives: a = silu(s) g, and its derivatives.

N pairs. `order_N` (N,) says which slot of `weights_N` each pair stands in; None or empty: its own.
The torch form serves every device, the Triton form spares passes over the pairs.
"""

import torch
from torch import Tensor

from flash_moe.ops.activation_kernels import activate_backward_kernel, activate_kernel
from flash_moe.ops.triton_launch import cdiv, launch

BLOCK = 1024


def activate(scores_N: Tensor, weights_N: Tensor, order_N: Tensor, in_kernels: bool) -> Tensor:
    """silu(scores) times the pair's weight, (N,) in the dtype of the scores."""
    if not in_kernels:
        return torch.nn.functional.silu(scores_N).mul_(weights_N)
    activations_N = torch.empty_like(scores_N)
    if scores_N.numel() > 0:
        launch(
            activate_kernel,
            (cdiv(scores_N.numel(), BLOCK),),
            scores_N,
            weights_N.contiguous(),
            order_N,
            activations_N,
            scores_N.numel(),
            HAS_ORDER=order_N.shape[0] > 0,
            BLOCK=BLOCK,
        )
    return activations_N


def activate_backward(
    activation_grads_N: Tensor | None,
    scores_N: Tensor,
    weights_N: Tensor,
    order_N: Tensor,
    needed: tuple[bool, bool, bool],
    in_kernels: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the scores (N,), the activations (N,) again, gradients of the weights by slot.

    Args:
        activation_grads_N: (N,), or None where only the activations are needed.
        needed: which of the three results; the others are None.
    """
    if not in_kernels:
        return _activate_backward(activation_grads_N, scores_N, weights_N, needed)
    scores, activations, weights = needed
    score_grads_N = torch.empty_like(scores_N) if scores else None
    activations_N = torch.empty_like(scores_N) if activations else None
    weight_grads_N = weights_N.new_empty(weights_N.shape) if weights else None
    if scores_N.numel() > 0 and any(needed):
        launch(
            activate_backward_kernel,
            (cdiv(scores_N.numel(), BLOCK),),
            scores_N if activation_grads_N is None else activation_grads_N,
            scores_N,
            weights_N.contiguous(),
            order_N,
            scores_N if score_grads_N is None else score_grads_N,
            scores_N if activations_N is None else activations_N,
            weights_N if weight_grads_N is None else weight_grads_N,
            scores_N.numel(),
            HAS_ORDER=order_N.shape[0] > 0,
            SCORES_NEEDED=scores,
            ACTIVATIONS_NEEDED=activations,
            WEIGHTS_NEEDED=weights,
            BLOCK=BLOCK,
        )
    return score_grads_N, activations_N, weight_grads_N


def _activate_backward(
    activation_grads_N: Tensor | None,
    scores_N: Tensor,
    weights_N: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    scores, activations, weights = needed
    sigmoid_N = torch.sigmoid(scores_N)
    silu_N = scores_N * sigmoid_N
    score_grads_N = weight_grads_N = None
    if activation_grads_N is not None and weights:
        weight_grads_N = (activation_grads_N * silu_N).to(weights_N.dtype)
    if activation_grads_N is not None and scores:
        # silu'(s) = sigma (1 + s (1 - sigma)): other forms cancel for large s.
        slope_N = (1 - sigmoid_N).mul_(scores_N).add_(1).mul_(sigmoid_N)
        score_grads_N = (activation_grads_N * weights_N).mul_(slope_N)
    return score_grads_N, silu_N.mul_(weights_N) if activations else None, weight_grads_N

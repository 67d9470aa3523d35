"""Training steps of expert tables: inputs, tables and their optimizer, and what a step does.

T tokens, H hidden size, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe import triton_flash_expert_func
from flash_moe.bench.cases import DTYPES
from flash_moe.bench.measure import Work
from flash_moe.optim import SGD, LazyAdam, RowwiseAdagrad, RowwiseAdam
from flash_moe_dist import clip_grad_norm_

# The gradients of the last one are dense.
KINDS: tuple[type[torch.optim.Optimizer], ...] = (
    RowwiseAdam,
    LazyAdam,
    RowwiseAdagrad,
    SGD,
    torch.optim.AdamW,
)
LR = 1e-3
# About as large as elements of clipped gradients: with a small one, Adam's first step of an element
# is the sign of its gradient, which rounding can change.
EPS = 0.1
PARTS = ("forward", "backward", "frozen backward", "clip", "step")

# Runs work, and returns its result and a measurement.
Observe = Callable[[Work[Any]], tuple[Any, float | None]]


@dataclass(frozen=True)
class Case:
    """Sizes of a pass, and dtype of hidden states and routing weights; routing is uniform.

    num_layers: layers, each with tables and inputs of its own.
    """

    tokens: int
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    num_layers: int
    dtype: str

    @property
    def num_parameters(self) -> int:
        """Elements of all tables, two for each layer."""
        return 2 * self.num_layers * self.num_experts * self.hidden_size

    def table_dtype(self, kind: type[torch.optim.Optimizer]) -> torch.dtype:
        """bfloat16 if hidden states are and the optimizer keeps the missing bits, else float32."""
        narrow = self.dtype == "bfloat16" and kind is not torch.optim.AdamW
        return torch.bfloat16 if narrow else torch.float32


class LayerInputs(NamedTuple):
    """Hidden states (T, H), expert ids and routing weights (T, K), gradient of outputs (T, H)."""

    hidden_states: Tensor
    indices: Tensor
    routing_weights: Tensor
    grad: Tensor


def make_inputs(case: Case, device: torch.device) -> list[LayerInputs]:
    """Draw the inputs of all layers; the same values on every call for one type of device."""
    draw = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]
    hidden, routing = ((case.tokens, size) for size in (case.hidden_size, case.num_experts_per_tok))
    return [
        LayerInputs(
            torch.randn(hidden, generator=draw, device=device).to(dtype).requires_grad_(),
            torch.randint(case.num_experts, routing, generator=draw, device=device),
            torch.rand(routing, generator=draw, device=device).to(dtype).requires_grad_(),
            torch.randn(hidden, generator=draw, device=device).to(dtype),
        )
        for _ in range(case.num_layers)
    ]


class Training:
    """Tables (E, H) of all layers, the down and the up table of each in turn, and an optimizer.

    max_norm: of clipping; a fraction of the gradients' norm, so that they are scaled.
    """

    def __init__(
        self, case: Case, inputs: list[LayerInputs], kind: type[torch.optim.Optimizer]
    ) -> None:
        self.inputs = inputs
        device = inputs[0].grad.device
        draw = torch.Generator(device).manual_seed(1)
        shape = (case.num_experts, case.hidden_size)
        self.tables = [
            torch.empty(shape, device=device, dtype=case.table_dtype(kind))
            .normal_(std=case.hidden_size**-0.5, generator=draw)
            .requires_grad_()
            for _ in range(2 * case.num_layers)
        ]
        options: dict[str, Any] = {"lr": LR} if kind is SGD else {"lr": LR, "eps": EPS}
        if kind is torch.optim.AdamW:
            options |= {"weight_decay": 0.0, "fused": True}
        self.optimizer = kind(self.tables, **options)
        pairs = case.num_layers * case.tokens * case.num_experts_per_tok
        # The norm itself is about half the root.
        self.max_norm = 0.1 * (pairs * case.hidden_size) ** 0.5

    def step(self, observe: Observe) -> tuple[Tensor, dict[str, float]]:
        """Take a training step, each part through `observe`.

        Returns:
            Norm of the gradients before clipping, (); measurements by part.
        """
        outs, forward = observe(self._forward)
        _, backward = observe(lambda: self._backward(outs))
        norm, clip = observe(lambda: clip_grad_norm_(self.tables, self.max_norm))
        _, step = observe(self.optimizer.step)
        self._drop_gradients()
        measured = {"forward": forward, "backward": backward, "clip": clip, "step": step}
        return norm, {part: one or 0.0 for part, one in measured.items()}

    def frozen_backward(self, observe: Observe) -> float:
        """Run a backward pass through `observe` that gives tables no gradients."""
        for table in self.tables:
            table.requires_grad_(False)
        outs = self._forward()
        _, measured = observe(lambda: self._backward(outs))
        for table in self.tables:
            table.requires_grad_()
        self._drop_gradients()
        return measured or 0.0

    def _forward(self) -> list[Tensor]:
        return [
            triton_flash_expert_func(
                layer.hidden_states, down, up, layer.indices, layer.routing_weights
            )
            for layer, down, up in zip(
                self.inputs, self.tables[::2], self.tables[1::2], strict=True
            )
        ]

    def _backward(self, outs: list[Tensor]) -> None:
        torch.autograd.backward(outs, [layer.grad for layer in self.inputs])

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        for layer in self.inputs:
            layer.hidden_states.grad = layer.routing_weights.grad = None

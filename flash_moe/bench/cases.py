"""Named benchmark cases, the routings they use, and the inputs generated for a case.

T tokens, H hidden size, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe.layers.router import squarest_grid

Func = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Most elements of a temporary tensor while a routing is drawn.
CHUNK_ELEMENTS = 2**26
# Up to this many tokens, launching kernels may take longer than their work.
FEW_TOKENS = 128
# Inputs that get a gradient.
LEAVES = ("hidden_states", "down_weights", "up_weights", "routing_weights")


@dataclass(frozen=True)
class Case:
    """A shape, a dtype and a routing.

    routing: a name in ROUTINGS. key_bias: for routing "product_keys", the standard deviation of the
    part of a key's score that all tokens share, where the part of each token has 1; with 0 all
    experts are equally likely.

    Raises:
        ValueError: K > E with product keys, or no factorization of E whose factors are within a
            factor of 2; a key bias without product keys, or one that is not finite.
    """

    name: str
    tokens: int
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    dtype: str = "bfloat16"
    routing: str = "uniform"
    key_bias: float = 0.0
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.key_bias):
            raise ValueError(f"key_bias must be finite, got {self.key_bias}")
        if self.routing != "product_keys":
            if self.key_bias:
                raise ValueError(f"key_bias is for routing product_keys, got {self.routing}")
            return
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts = {self.num_experts} with "
                f"product keys, got {self.num_experts_per_tok}"
            )
        sides = squarest_grid(self.num_experts)
        if max(sides) > 2 * min(sides):
            raise ValueError(
                f"num_experts must have two factors within a factor of 2 with product keys, "
                f"got {self.num_experts} = {sides[0]} * {sides[1]}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """T, H, E, K."""
        return self.tokens, self.hidden_size, self.num_experts, self.num_experts_per_tok

    @property
    def skewed(self) -> bool:
        """Whether some experts are expected to get more pairs than others."""
        return self.routing != "uniform"

    @property
    def few_tokens(self) -> bool:
        """Whether launching kernels may take longer than their work."""
        return self.tokens <= FEW_TOKENS

    @property
    def description(self) -> str:
        bias = f", key bias {self.key_bias:g}" if self.routing == "product_keys" else ""
        return f"T, H, E, K = {self.shape}, {self.dtype}, {self.routing}{bias}"


def _uniform(case: Case, draw: torch.Generator) -> Tensor:
    shape = (case.tokens, case.num_experts_per_tok)
    return torch.randint(case.num_experts, shape, generator=draw, device=draw.device)


def _product_keys(case: Case, draw: torch.Generator) -> Tensor:
    """Choose the K largest sums of two key scores, one from each axis of the expert grid.

    A key's score is N(0, 1), drawn for each token, plus key_bias * N(0, 1), drawn once.
    """
    slots = case.num_experts_per_tok
    sides = squarest_grid(case.num_experts)
    biases = [
        case.key_bias * torch.randn(side, generator=draw, device=draw.device) for side in sides
    ]
    # With both axes sorted, (i + 1)(j + 1) - 1 other sums are at least as large as sum (i, j).
    positions = [torch.arange(min(slots, side), device=draw.device) for side in sides]
    first, second = ((positions[0][:, None] + 1) * (positions[1] + 1) <= slots).nonzero().unbind(1)
    chunks = []
    for rows in torch.arange(case.tokens).split(max(1, CHUNK_ELEMENTS // len(first))):
        scores, keys = zip(
            *(
                (torch.randn(len(rows), len(bias), generator=draw, device=draw.device) + bias).topk(
                    min(slots, len(bias))
                )
                for bias in biases
            ),
            strict=True,
        )
        best = (scores[0][:, first] + scores[1][:, second]).topk(slots).indices
        chunks.append(keys[0].gather(1, first[best]) * sides[1] + keys[1].gather(1, second[best]))
    return torch.cat(chunks)


def _zipf(case: Case, draw: torch.Generator) -> Tensor:
    """Draw slots independently; the i-th most popular expert has a probability proportional to 1/i.

    A random permutation scatters the popular experts over the table.
    """
    count, device = case.num_experts, draw.device
    cdf = (1 / torch.arange(1, count + 1, dtype=torch.float64, device=device)).cumsum(0)
    shape = (case.tokens, case.num_experts_per_tok)
    quantiles = torch.rand(shape, generator=draw, dtype=torch.float64, device=device) * cdf[-1]
    popularity = torch.searchsorted(cdf, quantiles).clamp_(max=count - 1)
    return torch.randperm(count, generator=draw, device=device)[popularity]


def _one_expert(case: Case, draw: torch.Generator) -> Tensor:
    shape = (case.tokens, case.num_experts_per_tok)
    return torch.full(shape, case.num_experts // 2, device=draw.device)


# Each draws expert ids (T, K), int64, on the device of the generator.
ROUTINGS: dict[str, Callable[[Case, torch.Generator], Tensor]] = {
    "uniform": _uniform,
    "product_keys": _product_keys,
    "zipf": _zipf,
    "one_expert": _one_expert,
}

_MIDDLE = (4096, 1024, 102_400, 512)
CASES = {
    case.name: case
    for case in (
        *(
            Case(f"t{tokens}-k{slots}", tokens, 1024, 102_400, slots)
            for tokens, slots in (
                *((1024, slots) for slots in (512, 1024, 2048, 4096)),
                *((tokens, 512) for tokens in (2048, 4096, 8192, 16384)),
                (8192, 64),
            )
        ),
        Case("million", 8192, 2048, 1_048_576, 64),
        *(
            Case(f"product-keys-{bias:g}", *_MIDDLE, routing="product_keys", key_bias=bias)
            for bias in (0.5, 1.0, 2.0)
        ),
        Case("zipf", *_MIDDLE, routing="zipf"),
        Case("one-expert", *_MIDDLE, routing="one_expert"),
        *(Case(f"t{tokens}-k512", tokens, 1024, 102_400, 512) for tokens in (1, 16, 128)),
        # The same gathered bytes as _MIDDLE, except for h512, which has half as many.
        *(
            Case(f"h{hidden_size}", tokens, hidden_size, 102_400, 512)
            for hidden_size, tokens in ((512, 4096), (2048, 2048), (4096, 1024), (8192, 512))
        ),
        Case("fp16", *_MIDDLE, dtype="float16"),
        Case("fp32", *_MIDDLE, dtype="float32"),
        Case("cpu-small", 2048, 256, 16384, 32, dtype="float32", on_cpu=True),
        Case("cpu", 2048, 512, 65536, 64, dtype="float32", on_cpu=True),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Inputs of one forward and backward pass.

    leaves: tensors in the order of LEAVES, (T, H), (E, H), (E, H) and (T, K), in the dtype of the
        case.
    indices: expert ids (T, K), int64. grad: gradient of the output (T, H).
    """

    leaves: tuple[Tensor, Tensor, Tensor, Tensor]
    indices: Tensor
    grad: Tensor

    def call(self, func: Func) -> Tensor:
        hidden_states, down_weights, up_weights, routing_weights = self.leaves
        return func(hidden_states, down_weights, up_weights, self.indices, routing_weights)

    def versions(self) -> list[int]:
        """Count the in-place writes to each tensor so far."""
        return [tensor._version for tensor in (*self.leaves, self.indices, self.grad)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the inputs of a case; the same values on every call for one type of device."""
    draw = torch.Generator(device).manual_seed(0)
    tokens, hidden_size, experts, slots = case.shape

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=draw, device=device, dtype=torch.float32).mul_(std)
        return values.to(DTYPES[case.dtype]).requires_grad_()

    leaves = (
        normal(tokens, hidden_size),
        normal(experts, hidden_size, std=hidden_size**-0.5),
        normal(experts, hidden_size),
        normal(tokens, slots),
    )
    return Inputs(leaves, ROUTINGS[case.routing](case, draw), normal(tokens, hidden_size).detach())

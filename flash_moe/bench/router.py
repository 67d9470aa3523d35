"""The choice of experts by `product_key_topk`, next to the plain operations that it replaces.

T tokens, A and B keys of the two axes, K chosen experts, C candidates. A variant takes key scores
(T, A) and (T, B) and returns experts i * B + j (T, K) and routing weights (T, K), which sum to one.
"""

import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flash_moe.bench.cases import DTYPES
from flash_moe.bench.measure import (
    DIRECTIONS,
    MAX_BASELINE_ERROR,
    MAX_ERROR,
    Clock,
    PeakMemory,
    Result,
    Work,
    relative_error,
    unobserved,
)
from flash_moe.bench.report import device_name, versions
from flash_moe.layers.router import squarest_grid
from flash_moe.ops.product_keys import candidate_ranks, product_key_topk

OURS, PLAIN = "product_key_topk", "plain operations"

Choice = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Runs work, and returns its result and a measurement.
Observe = Callable[[Work[tuple[Tensor, ...]]], tuple[tuple[Tensor, ...], float | int | None]]


@dataclass(frozen=True)
class RouterCase:
    """Shape and dtype of the key scores; the experts form the most nearly square grid.

    Raises:
        ValueError: K > E.
    """

    tokens: int
    num_experts: int
    num_experts_per_tok: int
    dtype: str

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts = {self.num_experts}, "
                f"got {self.num_experts_per_tok}"
            )


@dataclass(frozen=True)
class RouterInputs:
    """Key scores (T, A) and (T, B) that get a gradient, and the gradient (T, K) of the weights."""

    scores: tuple[Tensor, Tensor]
    grad: Tensor

    def one_pass(self, func: Choice, observe: Observe) -> tuple[tuple[Tensor, ...], list[float]]:
        """Run forward and backward through `observe`.

        Returns:
            Experts, weights and the gradients of both scores; the measurements of the directions.
        """
        (experts, weights), forward = observe(lambda: func(*self.scores))
        # The weights of 16-bit scores are float32.
        grad = self.grad.to(weights.dtype)
        grads, backward = observe(lambda: torch.autograd.grad(weights, self.scores, grad))
        return (experts, weights, *grads), [forward or 0, backward or 0]


def make_router_inputs(case: RouterCase, device: torch.device) -> RouterInputs:
    """Draw the inputs of a case; the same values on every call for one type of device."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device).to(DTYPES[case.dtype])

    first, second = (
        normal(case.tokens, side).requires_grad_() for side in squarest_grid(case.num_experts)
    )
    return RouterInputs((first, second), normal(case.tokens, case.num_experts_per_tok))


def fused_choice(first_scores: Tensor, second_scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose with `product_key_topk`."""
    experts, scores = product_key_topk(first_scores, second_scores, k)
    return experts, scores.softmax(-1)


def plain_choice(
    first_scores: Tensor, second_scores: Tensor, ranks: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Choose with log_softmax, topk and indexing, in float32 at least.

    ranks: (2, C) of the candidates in both sorted axes.
    """
    wide = torch.promote_types(first_scores.dtype, torch.float32)
    (first, first_keys), (second, second_keys) = (
        scores.log_softmax(-1, dtype=wide).topk(min(k, scores.shape[1]))
        for scores in (first_scores, second_scores)
    )
    first_ranks, second_ranks = ranks
    sums, chosen = (first[:, first_ranks] + second[:, second_ranks]).topk(k)
    experts = first_keys.gather(1, first_ranks[chosen]) * second_scores.shape[1]
    return experts + second_keys.gather(1, second_ranks[chosen]), sums.softmax(-1)


def verify_choice(
    inputs: RouterInputs, best_TK: Tensor, max_error: float, name: str, func: Choice
) -> dict[str, float]:
    """Return the largest relative errors of the directions against float64.

    Experts are right if they differ and their exact sums are the best, whatever the order of
    sums that rounding makes equal. Weights and gradients are compared for the chosen experts.

    Args:
        best_TK: the best sums of exact scores, best first.

    Raises:
        RuntimeError: an expert is wrong, or an error is above `max_error`.
    """
    (experts, *computed), _ = inputs.one_pass(func, unobserved)
    exact_scores = [scores.detach().double().requires_grad_() for scores in inputs.scores]
    num_second = exact_scores[1].shape[1]
    first_keys, second_keys = experts // num_second, experts % num_second
    sums_TK = exact_scores[0].gather(1, first_keys) + exact_scores[1].gather(1, second_keys)
    by_id = experts.sort(1).values
    if (by_id[:, 1:] == by_id[:, :-1]).any():
        raise RuntimeError(f"{name} is wrong: an expert was chosen twice for a token")
    lost = (best_TK - sums_TK.detach().sort(1, descending=True).values).abs().max()
    # Sums are compared in float32.
    if not lost <= MAX_ERROR[torch.float32] * (1 + best_TK.abs().max()):
        raise RuntimeError(f"{name} is wrong: a chosen sum is {float(lost):.1e} below the best")
    weights_TK = sums_TK.softmax(-1)
    grads = torch.autograd.grad(weights_TK, exact_scores, inputs.grad.double())
    exact = (weights_TK.detach(), *grads)
    # Together, as the gradients of an axis of one key, or of one expert a token, are 0.
    together = torch.cat([one.double() for one in computed], 1), torch.cat(exact, 1)
    errors = relative_error(computed[0], exact[0]), relative_error(*together)
    if max(errors) > max_error:
        raise RuntimeError(f"{name} is wrong: relative error {max(errors):.1e}")
    return dict(zip(DIRECTIONS, errors, strict=True))


def measure_router(case: RouterCase, device: torch.device, repeats: int) -> dict[str, Result]:
    """Verify both variants, then measure memory and times, interleaved, and verify them again.

    Raises:
        RuntimeError: a result is wrong.
    """
    inputs = make_router_inputs(case, device)
    k = case.num_experts_per_tok
    sides = [scores.shape[1] for scores in inputs.scores]
    ranks = torch.tensor(candidate_ranks(k, *sides), device=device).t().contiguous()
    variants: dict[str, Choice] = {
        OURS: partial(fused_choice, k=k),
        PLAIN: partial(plain_choice, ranks=ranks, k=k),
    }
    limits = {OURS: MAX_ERROR, PLAIN: MAX_BASELINE_ERROR}
    with torch.no_grad():
        first, second = (scores.double().topk(min(k, scores.shape[1])) for scores in inputs.scores)
        best_TK = (first.values[:, ranks[0]] + second.values[:, ranks[1]]).topk(k).values
    results = {name: Result() for name in variants}

    def verify_all() -> None:
        for name, func in variants.items():
            limit = limits[name][DTYPES[case.dtype]]
            results[name].errors = verify_choice(inputs, best_TK, limit, name, func)

    verify_all()
    for name, func in variants.items():
        gc.collect()
        _, extra = inputs.one_pass(func, PeakMemory(device))
        results[name].extra_bytes = {d: int(b) for d, b in zip(DIRECTIONS, extra, strict=True)}
    clock = Clock(device)
    for _ in range(repeats):
        for name, func in variants.items():
            for recorded, idle in (
                (results[name].seconds, False),
                (results[name].idle_seconds, True),
            ):
                if idle and device.type == "cpu":
                    continue
                seconds = inputs.one_pass(func, partial(clock, idle=idle))[1]
                for direction, one in zip(DIRECTIONS, seconds, strict=True):
                    recorded[direction].append(one)
    verify_all()
    return results


def router_table(case: RouterCase, device: torch.device, results: dict[str, Result]) -> str:
    """A row for each direction and variant, and for both directions together.

    Columns as in `flash_moe.bench.report.table`; "ratio" is that of "idle ms" on a GPU, else of
    "median ms".
    """
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"router: T, E, K = ({case.tokens}, {case.num_experts}, {case.num_experts_per_tok}), keys "
        f"{squarest_grid(case.num_experts)}, {case.dtype}, {device.type} "
        f"({device_name(device)}), {named}",
        f"  {'':34}{'median ms':>11}{'idle ms':>10}{'ratio':>9}{'extra MB':>10}{'error':>9}",
    ]
    for directions in (*((direction,) for direction in DIRECTIONS), DIRECTIONS):
        ours = _seconds(results[OURS], directions)[-1]
        for name, result in results.items():
            seconds = _seconds(result, directions)
            idle = f"{seconds[1] * 1e3:.3f}" if len(seconds) > 1 else ""
            lines.append(
                f"  {' + '.join(directions) + ', ' + name:34}{seconds[0] * 1e3:11.3f}{idle:>10}"
                f"{seconds[-1] / ours:8.2f}x"
                f"{max(result.extra_bytes[one] for one in directions) / 1e6:10.1f}"
                f"{max(result.errors[one] for one in directions):9.1e}"
            )
    return "\n".join(lines)


def _seconds(result: Result, directions: tuple[str, ...]) -> list[float]:
    """Median seconds of a pass on a busy device and, on a GPU, on an idle one."""
    return [
        statistics.median(map(sum, zip(*(recorded[one] for one in directions), strict=True)))
        for recorded in (result.seconds, result.idle_seconds)
        if recorded[directions[0]]
    ]


def write_router_json(
    path: Path,
    case: RouterCase,
    device: torch.device,
    results: dict[str, Result],
    command: list[str],
) -> None:
    """Write what was measured; times in seconds, sizes in bytes."""
    content = {
        "command": command,
        "versions": versions(),
        "case": asdict(case),
        "device": {"type": device.type, "name": device_name(device)},
        "results": {name: asdict(result) for name, result in results.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")

"""Kernels of the routers' statistics, and the same operations of PyTorch, against batch norm."""

import pytest
import torch
from cases import assert_close
from torch import Tensor, nn

from flash_moe.layers.score_norm import EPS, ScoreNorm
from flash_moe.ops.key_load import _count_op, count_keys
from flash_moe.ops.score_norm import batch_statistics, normalize

# Tokens, keys: more than a block of both, and less.
SHAPES = [(150, 7), (5, 300), (3, 1), (1, 3)]


@pytest.fixture(params=["kernels", "operations"])
def place(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> torch.device:
    """Where kernels do the work, or operations of PyTorch."""
    if request.param == "kernels":
        return device
    monkeypatch.setenv("FLASH_MOE_BACKEND", "torch_sparse")
    return torch.device("cpu")


def normalized(scores: Tensor) -> Tensor:
    return normalize(scores, batch_statistics(scores.detach(), EPS, None), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_batch_norm_in_float64(
    shape: tuple[int, int], dtype: torch.dtype, place: torch.device
) -> None:
    torch.manual_seed(0)
    # Far from zero, and rows of a wider tensor.
    wide = (torch.randn(shape[0], 2 * shape[1]) + 20).to(place, dtype)
    scores = wide[:, : shape[1]].requires_grad_()
    exact = scores.detach().double().requires_grad_()
    variance, mean = torch.var_mean(exact, dim=0, correction=0)
    expected = (exact - mean) / (variance + EPS).sqrt()
    out = normalized(scores)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The mean is rounded to float32: an error of 2^-24 of 20, over a spread of about 1.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert_close(out, expected, tolerance, "normalized")
    grads = torch.randn(shape).to(out)
    (grad,) = torch.autograd.grad(out, scores, grads)
    (other,) = torch.autograd.grad(expected, exact, grads.double())
    assert grad.dtype == dtype
    if shape[0] == 1:
        assert grad.abs().max() == 0
    else:
        assert_close(grad, other, {torch.bfloat16: 2**-8}.get(dtype, tolerance), "gradient")


def test_moments_are_added_up(place: torch.device) -> None:
    norm, expected = ScoreNorm(7, place), nn.BatchNorm1d(7, affine=False)
    torch.manual_seed(0)
    batches = [torch.randn(number, 7) + 20 for number in (100, 0, 1)]
    for batch in batches:
        norm.add(norm(batch.to(place)).moments)
    norm.update()
    expected(torch.cat(batches))
    assert_close(norm.running_mean, expected.get_buffer("running_mean"), 1e-6, "mean")
    assert_close(norm.running_var, expected.get_buffer("running_var"), 1e-5, "variance")
    assert norm.moments.count_nonzero() == 0


def test_scores_by_columns(place: torch.device) -> None:
    scores = torch.randn(7, 30, device=place).t().requires_grad_()
    dense = scores.detach().contiguous().requires_grad_()
    grads = torch.randn(30, 7, device=place)
    results = [(normalized(one), one) for one in (scores, dense)]
    assert torch.equal(results[0][0], results[1][0])
    (grad,), (other_grad,) = (torch.autograd.grad(*pair, grads) for pair in results)
    assert torch.equal(grad, other_grad)


def test_no_tokens(place: torch.device) -> None:
    scores = torch.zeros(0, 5, device=place, requires_grad=True)
    normalized(scores).sum().backward()
    assert scores.grad is not None
    assert scores.grad.shape == (0, 5)


def test_bitwise_repeatable(place: torch.device) -> None:
    scores = torch.randn(300, 40, device=place, requires_grad=True)
    grads = torch.randn(300, 40, device=place)

    def step() -> list[Tensor]:
        out = normalized(scores)
        return [out, *torch.autograd.grad(out, scores, grads)]

    for one, other in zip(step(), step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("shape", "grid"), [((50, 9), (5, 6)), ((3, 2), (1, 40)), ((0, 4), (2, 2)), ((4100, 2), (3, 3))]
)
def test_counts_of_keys(shape: tuple[int, int], grid: tuple[int, int], place: torch.device) -> None:
    torch.manual_seed(0)
    indices = torch.randint(grid[0] * grid[1], shape)
    load = torch.bincount(indices.flatten(), minlength=grid[0] * grid[1]).view(grid)
    counts = count_keys(indices.to(place), *grid)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [*load.sum(1).tolist(), *load.sum(0).tolist()]
    torch.library.opcheck(_count_op, (indices.to(place), *grid))

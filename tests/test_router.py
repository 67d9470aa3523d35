"""Product-key routing against the best of all sums."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import RankPools

from flash_moe import ProductKeyRouter
from flash_moe.layers.router import squarest_grid


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(
    ("grid", "count"),
    [((9, 9), 1), ((9, 9), 20), ((9, 9), 81), ((3, 40), 30), ((40, 3), 30), ((1, 13), 5)],
)
def test_best_of_all_sums(grid: tuple[int, int], count: int, norm_topk_prob: bool) -> None:
    torch.manual_seed(0)
    num_experts = grid[0] * grid[1]
    router = ProductKeyRouter(
        16, num_experts, count, norm_topk_prob, key_grid=grid, score_norm=None
    ).double()
    hidden_states = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    indices, weights = router(hidden_states)

    first, second = router.keys(hidden_states).split(grid, dim=-1)
    sums = first.log_softmax(-1).unsqueeze(-1) + second.log_softmax(-1).unsqueeze(-2)
    probabilities, best = sums.flatten(-2).exp().topk(count)
    if norm_topk_prob:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    assert torch.equal(indices, best)
    torch.testing.assert_close(weights, probabilities)

    draws = torch.randn_like(weights)
    parameters = (hidden_states, router.keys.weight)
    torch.testing.assert_close(
        torch.autograd.grad(weights, parameters, draws),
        torch.autograd.grad(probabilities, parameters, draws),
    )


def test_leading_dimensions_are_kept() -> None:
    indices, weights = ProductKeyRouter(8, 30, 4)(torch.randn(2, 3, 8))
    assert indices.shape == weights.shape == (2, 3, 4)
    assert indices.dtype == torch.int64


def test_squarest_grid() -> None:
    assert squarest_grid(102_400) == (320, 320)
    assert squarest_grid(48) == (6, 8)
    assert squarest_grid(13) == (1, 13)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"num_experts_per_tok must lie in .* 30\], got 31"):
        ProductKeyRouter(8, 30, 31)
    for wrong in ((10, 3, 1), (30,)):
        with pytest.raises(ValueError, match="key_grid must be two numbers"):
            ProductKeyRouter(8, 30, 3, key_grid=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"key_grid must be .* got \(5, 5\)"):
        ProductKeyRouter(8, 30, 3, key_grid=(5, 5))
    with pytest.raises(ValueError, match=r"key_grid must be .* got \(-5, -6\)"):
        ProductKeyRouter(8, 30, 3, key_grid=(-5, -6))
    with pytest.raises(ValueError, match=r"got 102397, at best 1 \* 102397: take 102400 "):
        ProductKeyRouter(8, 102_397, 3)
    with pytest.raises(ValueError, match=r"rows of hidden_size = 8, got shape \(4, 9\)"):
        ProductKeyRouter(8, 30, 3)(torch.randn(4, 9))


def test_probabilities_in_half_precision_are_rounded_once() -> None:
    torch.manual_seed(0)
    router = ProductKeyRouter(16, 10_000, 8, dtype=torch.bfloat16, score_norm=None)
    hidden_states = torch.randn(64, 16, dtype=torch.bfloat16)
    indices, weights = router(hidden_states)
    assert weights.dtype == torch.bfloat16
    first, second = router.keys(hidden_states).double().split(router.key_grid, dim=-1)
    sums = first.log_softmax(-1).unsqueeze(-1) + second.log_softmax(-1).unsqueeze(-2)
    chosen = sums.flatten(-2).gather(-1, indices).softmax(-1)
    assert ((weights - chosen) / chosen).abs().max() <= 2**-8


def test_ties() -> None:
    router = ProductKeyRouter(4, 12 * 12, 30, norm_topk_prob=False, score_norm=None)
    torch.nn.init.zeros_(router.keys.weight)
    indices, weights = router(torch.randn(5, 4))
    assert all(len(set(row.tolist())) == 30 for row in indices)
    torch.testing.assert_close(weights, torch.full((5, 30), 1 / 144))
    # Scores from a few values only: the best are the best, whichever of equals they are.
    router.keys = torch.nn.Identity()  # type: ignore[assignment]
    router.hidden_size = 24
    scores = torch.randint(3, (50, 24)).double()
    indices, weights = router(scores)
    first, second = scores.split(12, dim=-1)
    sums = first.log_softmax(-1).unsqueeze(-1) + second.log_softmax(-1).unsqueeze(-2)
    torch.testing.assert_close(weights, sums.flatten(-2).exp().topk(30)[0])
    torch.testing.assert_close(weights, sums.flatten(-2).exp().gather(-1, indices))
    assert all(len(set(row.tolist())) == 30 for row in indices)


def routers() -> list[ProductKeyRouter]:
    """Routers: two of one grid, one of the transposed grid, one made before grids were saved."""
    made = [ProductKeyRouter(8, 24, 4, key_grid=grid) for grid in ((4, 6), (4, 6), (6, 4), (4, 6))]
    del made[3].grid
    return made


def test_keys_of_another_grid_are_refused() -> None:
    router, other, transposed, old = routers()
    with pytest.raises(RuntimeError, match=r"size mismatch for grid: .*\[6, 4, 0\].*\[4, 6, 0\]"):
        router.load_state_dict(transposed.state_dict())
    for loadable in (other, old):
        router.load_state_dict(loadable.state_dict())
        assert torch.equal(router.keys.weight, loadable.keys.weight)


def test_a_state_dict_of_the_old_default_warns() -> None:
    old = ProductKeyRouter(8, 24, 3).state_dict()
    del old["grid"]
    with pytest.warns(UserWarning, match="default was norm_topk_prob=False"):
        ProductKeyRouter(8, 24, 3).load_state_dict(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProductKeyRouter(8, 24, 3, norm_topk_prob=False).load_state_dict(old)


def load_grids(folder: str) -> None:
    from flash_moe_dist.checkpoint import Checkpointer
    from flash_moe_dist.export import export_tensors, import_tensors

    checkpoints = Checkpointer(Path(folder), keep=3)
    router, *others = routers()
    for step, other in enumerate(others):
        path = Path(folder) / f"{step}.safetensors"
        checkpoints.save(step, other, torch.optim.SGD(other.parameters()))
        export_tensors(path, other.state_dict())
        for load in (
            partial(checkpoints.load, step, router, torch.optim.SGD(router.parameters())),
            partial(import_tensors, path, router.state_dict()),
        ):
            before = router.keys.weight.clone()
            if other.key_grid == router.key_grid:
                load()
                assert torch.equal(router.keys.weight, other.keys.weight)
            else:
                with pytest.raises(ValueError, match=r"grid: saved \(.6, 4, 0.*here \(.4, 6, 0"):
                    load()
                assert torch.equal(router.keys.weight, before)
            torch.nn.init.normal_(router.keys.weight)
    checkpoints.close()


def test_files_of_another_grid_are_refused(tmp_path: Path, rank_pools: RankPools) -> None:
    rank_pools.run(1, load_grids, str(tmp_path))

"""Optimizers of torch.optim: dtypes of tables they suit, and groups that mix meshes."""

from typing import Any

import pytest
import torch
from cases import assert_close
from ranks import RankPools, rank_runtime
from sharded import whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe import FlashExperts, FlashMoE
from flash_moe_dist import ExpertParallel, parameter_groups

NUM_EXPERTS, HIDDEN_SIZE = 12, 8


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    moe = FlashMoE(HIDDEN_SIZE, 6, NUM_EXPERTS, 2)
    return nn.Sequential(nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE), moe)


def fused_steps(model: nn.Module) -> list[int]:
    """Three fused steps over `model`; sizes of the parameter groups."""
    groups = parameter_groups(model.parameters())
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        model(torch.randn(5, HIDDEN_SIZE, generator=draw)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [len(group["params"]) for group in groups]


def mixed_groups() -> None:
    runtime = rank_runtime()
    alone = new_model()
    assert fused_steps(alone) == [8]
    for dense in ("plain", "sharded", "partly sharded"):
        model = new_model()
        parallelize_module(model, runtime.ep_mesh, {"1.experts": ExpertParallel()})
        tables = set(model[1].get_submodule("experts").parameters())
        if dense == "sharded":
            fully_shard(model, mesh=runtime.dp_mesh, ignored_params=tables)
        if dense == "partly sharded":
            fully_shard(model[0], mesh=runtime.dp_mesh)
        sizes = fused_steps(model)
        assert sizes == ([2, 4, 2] if dense == "partly sharded" else [6, 2])
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert_close(whole(one), whole(other), 1e-5, dense)


def test_fused_steps_over_plain_tensors_and_meshes(rank_pools: RankPools) -> None:
    rank_pools.run(2, mixed_groups)


def trained(dtype: torch.dtype, optimizer: type[torch.optim.Optimizer], **options: Any) -> Tensor:
    """Change of the up table in 8 steps in which tokens reach expert 0 alone."""
    torch.manual_seed(0)
    experts = FlashExperts(4, HIDDEN_SIZE, dtype=dtype)
    before = experts.up_weights.detach().clone()
    # What flash_moe_dist/README.md says about float16 goes without them, as they refuse it.
    groups: Any = experts.parameters()
    if dtype != torch.float16:
        groups = parameter_groups(experts.parameters())
    updates = optimizer(groups, **options)
    x = torch.randn(3, HIDDEN_SIZE, dtype=dtype)
    for _ in range(8):
        ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=dtype)
        experts(x, ids, weights).float().square().mean().backward()
        updates.step()
        updates.zero_grad()
    return experts.up_weights.detach() - before


FORMS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
COMBINATIONS = [
    (dtype, optimizer, form)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for optimizer in (torch.optim.AdamW, torch.optim.SGD)
    for form in FORMS
    # Fused SGD leaves most elements in 16 bits unchanged on CPUs (torch 2.13).
    if (optimizer, form) != (torch.optim.SGD, "fused") or dtype == torch.float32
    if (dtype, optimizer) != (torch.float16, torch.optim.AdamW)
]


@pytest.mark.parametrize(("dtype", "optimizer", "form"), COMBINATIONS)
def test_rows_that_no_token_reaches_stay(
    dtype: torch.dtype, optimizer: type[torch.optim.Optimizer], form: str
) -> None:
    change = trained(dtype, optimizer, lr=1.0, weight_decay=0.0, **FORMS[form])
    assert change.isfinite().all()
    assert change[0].count_nonzero() > HIDDEN_SIZE // 2
    assert change[1:].count_nonzero() == 0


def second_moment(dtype: torch.dtype, beta: float) -> float:
    """Second moment of one gradient after 100 more steps without a gradient."""
    parameter = nn.Parameter(torch.ones(4, dtype=dtype))
    groups = parameter_groups([parameter])
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta), fused=True)
    moments = []
    for step in range(101):
        parameter.grad = torch.full_like(parameter, float(step == 0))
        optimizer.step()
        moments.append(optimizer.state[parameter]["exp_avg_sq"][0].item())
    return moments[-1] / moments[0]


def test_second_moment_falls() -> None:
    assert second_moment(torch.float32, 0.999) == pytest.approx(0.999**100, rel=1e-3)
    for beta in (0.95, 0.99):
        assert second_moment(torch.bfloat16, beta) == pytest.approx(beta**100, rel=0.5)
    # Why flash_moe_dist/README.md advises against it.
    assert second_moment(torch.bfloat16, 0.999) == 1


@pytest.mark.parametrize("form", ["loop", "foreach"])
def test_adam_in_float16_makes_rows_without_gradients_nan(form: str) -> None:
    """Why flash_moe_dist/README.md advises against it, and `parameter_groups` refuses it."""
    change = trained(torch.float16, torch.optim.AdamW, lr=1.0, **FORMS[form])
    assert change[1:].isnan().all()


def test_fused_adam_in_float16_makes_steps_too_long() -> None:
    changes = []
    for dtype in (torch.float32, torch.float16):
        parameter = nn.Parameter(torch.zeros(4, dtype=dtype))
        optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0, fused=True)
        for gradient in (1e-4, 0.0):
            parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
        changes.append(parameter.detach().float().abs().max().item())
    assert changes[0] < 2
    assert changes[1] > 1000 * changes[0]


def test_float16_is_refused() -> None:
    experts = FlashExperts(4, HIDDEN_SIZE, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"parameters must not be float16, got .* \(4, 8\)"):
        parameter_groups(experts.parameters())

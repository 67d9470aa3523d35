"""The layers over the op."""

import pytest
import torch
from ranks import RankPools
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flash_moe import FlashExperts, FlashMoE
from flash_moe.ops.naive import naive_expert_func


def test_flash_moe_is_shared_mlp_plus_routed_experts() -> None:
    torch.manual_seed(0)
    layer = FlashMoE(16, 24, num_experts=50, num_experts_per_tok=4, norm_topk_prob=True).double()
    hidden_states = torch.randn(3, 5, 16, dtype=torch.float64)
    indices, weights = layer.router(hidden_states)
    mlp = layer.shared_mlp
    shared = mlp.down_proj(
        nn.functional.silu(mlp.gate_proj(hidden_states)) * mlp.up_proj(hidden_states)
    )
    routed = naive_expert_func(
        hidden_states.flatten(0, 1),
        layer.experts.down_weights,
        layer.experts.up_weights,
        indices.flatten(0, 1),
        weights.flatten(0, 1),
    )
    torch.testing.assert_close(layer(hidden_states), shared + routed.view_as(shared))


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    layer = FlashMoE(16, 24, num_experts=12, num_experts_per_tok=6)
    layer(torch.randn(40, 16)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_tables_on_meta_are_initialised_later() -> None:
    experts = FlashExperts(1000, 64, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    experts.reset_parameters()
    assert abs(experts.down_weights.std().item() * 8 - 1) < 0.02
    assert abs(experts.up_weights.std().item() - 1) < 0.02


@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (2, 0)])
def test_experts_without_slots_or_tokens(leading: tuple[int, ...]) -> None:
    experts = FlashExperts(5, 4)
    rows = leading or (3,)
    out = experts(torch.randn(*rows, 4), torch.zeros(*rows, 0).long(), torch.zeros(*rows, 0))
    assert out.shape == (*rows, 4)
    assert out.count_nonzero() == 0


def test_experts_refuse_what_does_not_fit() -> None:
    experts = FlashExperts(5, 4)
    ids, weights = torch.zeros(3, 2, 1).long(), torch.zeros(2, 3, 1)
    with pytest.raises(ValueError, match="hidden_states must have shape"):
        experts(torch.randn(2, 3, 4), ids, weights)
    with pytest.raises(TypeError, match=r"indices must be a torch.Tensor, got list"):
        experts(torch.randn(3, 4), [[0]], torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"rows of hidden_size = 4, got shape \(3, 5\)"):
        FlashMoE(4, 8, num_experts=9, num_experts_per_tok=2)(torch.randn(3, 5))


def test_layer_built_on_meta_takes_a_state_dict() -> None:
    torch.manual_seed(0)
    layer = FlashMoE(16, 24, num_experts=48, num_experts_per_tok=6)
    with torch.device("meta"):
        empty = FlashMoE(16, 24, num_experts=48, num_experts_per_tok=6)
    later = empty.to_empty(device="cpu")
    later.router.candidates_first.fill_(10**9)
    later = later.to_empty(device="cpu")
    later.load_state_dict(layer.state_dict())
    hidden_states = torch.randn(7, 16)
    assert torch.equal(later(hidden_states), layer(hidden_states))


def test_export_with_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", "reference")
    layer = FlashMoE(16, 24, num_experts=48, num_experts_per_tok=6)
    tokens = torch.export.Dim("tokens", max=1024)
    exported = torch.export.export(
        layer, (torch.randn(5, 16),), dynamic_shapes={"hidden_states": {0: tokens}}
    )
    hidden_states = torch.randn(9, 16)
    assert torch.equal(exported.module()(hidden_states), layer(hidden_states))


def test_dtensor_tables_without_expert_parallel_are_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(1, call_with_dtensor):
        assert outcome.kind == "TypeError"
        assert "down_weights must be a plain tensor, got a DTensor" in outcome.message


def call_with_dtensor() -> None:
    experts = FlashExperts(5, 4)
    tables = distribute_tensor(torch.randn(5, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    experts.down_weights = nn.Parameter(tables)
    experts(torch.randn(3, 4), torch.zeros(3, 1).long(), torch.ones(3, 1))

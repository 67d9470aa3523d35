"""The layers over the op."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from ranks import RankPools
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import flash_moe
import flash_moe_dist
from flash_moe import FlashExperts, FlashMoE
from flash_moe.layers.moe import (
    MEAN_SQUARE_SILU,
    MEAN_SQUARE_SILU_THIRD,
    initial_up_std,
    mean_square_weights,
)
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
    layer.eval()
    torch.testing.assert_close(layer(hidden_states[0, 0]), layer(hidden_states)[0, 0])


# Few experts or slots make other sums than many. Grids of two numbers far apart: 7, 1022, 1996.
@pytest.mark.parametrize(
    ("num_experts", "slots"),
    [
        *((4, slots) for slots in (1, 2, 4)),
        *((7, 3), (16, 16), (64, 1), (64, 8), (64, 64), (100, 10), (1022, 64), (1996, 9)),
        *((1024, slots) for slots in (32, 256, 1024)),
        *((16_384, 32), (102_400, 16), (102_400, 512), (1_000_000, 1), (1_000_000, 512)),
    ],
)
def test_routed_and_shared_parts_begin_at_the_same_size(
    num_experts: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", "reference")
    hidden_size = 256 if num_experts < 100 else 32
    check_initial_sizes(num_experts, slots, hidden_size, tokens=128, score_norm=None)


@pytest.mark.parametrize(("num_experts", "slots"), [(4, 2), (64, 8), (1022, 64), (1024, 32)])
def test_they_do_with_normalized_scores(
    num_experts: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", "reference")
    # Normalized scores are nearly normal where there are many inputs and tokens.
    check_initial_sizes(num_experts, slots, hidden_size=256, tokens=512, score_norm="batch")


def check_initial_sizes(
    num_experts: int,
    slots: int,
    hidden_size: int,
    tokens: int,
    score_norm: Literal["batch"] | None,
) -> None:
    torch.manual_seed(0)
    hidden_states = nn.functional.rms_norm(torch.randn(tokens, hidden_size), (hidden_size,))
    routed = shared = squares = 0.0
    # Tables of few rows differ much from each other.
    layers = 40 if num_experts < 100 else 10 if num_experts < 10_000 else 1
    for _ in range(layers):
        layer = FlashMoE(hidden_size, 512, num_experts, slots, score_norm=score_norm)
        with torch.no_grad():
            indices, weights = layer.router(hidden_states)
            squares += weights.square().sum(-1).mean().item() / layers
            routed += layer.experts(hidden_states, indices, weights).var().item()
            shared += layer.shared_mlp(hidden_states).var().item()
    expected = mean_square_weights(num_experts, slots, 1 if score_norm else 1 / 3)
    assert squares == pytest.approx(expected, rel=0.03)
    assert math.sqrt(routed / shared) == pytest.approx(1, abs=0.04)


def test_mean_squares_of_silu() -> None:
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = z.square().div(-2).exp() / math.sqrt(2 * math.pi)
    for variance, mean_square in ((1, MEAN_SQUARE_SILU), (1 / 3, MEAN_SQUARE_SILU_THIRD)):
        squares = nn.functional.silu(z * variance**0.5).square()
        assert torch.trapezoid(squares * density, z).item() == pytest.approx(mean_square, rel=1e-6)


def test_initial_values_without_normalised_weights() -> None:
    """Not normalising was the default before version 0.2.0; initial values stay as they were."""
    for norm_topk_prob, std in ((True, initial_up_std(1024, 8)), (False, 1.0)):
        torch.manual_seed(0)
        layer = FlashMoE(16, 24, 1024, 8, norm_topk_prob=norm_topk_prob, score_norm=None)
        assert layer.experts.up_weights.std().item() == pytest.approx(std, rel=0.02)
    assert initial_up_std(1024, 8) == pytest.approx(0.5, abs=0.05)


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


def test_integers_of_other_libraries_are_sizes() -> None:
    layer = FlashMoE(np.int64(8), 6, torch.tensor(9), 2)  # type: ignore[arg-type]
    assert (layer.experts.num_experts, layer.experts.hidden_size) == (9, 8)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (2, 0)])
def test_experts_without_slots_or_tokens(leading: tuple[int, ...]) -> None:
    experts = FlashExperts(5, 4)
    out = experts(
        torch.randn(*leading, 4), torch.zeros(*leading, 0).long(), torch.zeros(*leading, 0)
    )
    assert out.shape == (*leading, 4)
    assert out.count_nonzero() == 0


def test_experts_refuse_what_does_not_fit() -> None:
    experts = FlashExperts(5, 4)
    ids, weights = torch.zeros(3, 2, 1).long(), torch.zeros(2, 3, 1)
    with pytest.raises(ValueError, match="hidden_states must have shape"):
        experts(torch.randn(2, 3, 4), ids, weights)
    with pytest.raises(TypeError, match=r"indices must be a torch.Tensor, got list"):
        experts(torch.randn(3, 4), [[0]], torch.zeros(3, 1))
    layer = FlashMoE(4, 8, num_experts=9, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"rows of hidden_size = 4, got shape \(3, 5\)"):
        layer(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"hidden_states must be on cpu, where .* got meta"):
        layer(torch.randn(3, 4, device="meta"))


@pytest.mark.parametrize("autocast", [False, True])
def test_hidden_states_of_another_dtype(autocast: bool) -> None:
    layer = FlashMoE(4, 8, num_experts=9, num_experts_per_tok=2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for dtype in (torch.float64, *([] if autocast else [torch.bfloat16])):
            message = f"hidden_states must have the dtype .*, torch.float32, .* got {dtype}"
            with pytest.raises(TypeError, match=message):
                layer(torch.randn(3, 4, dtype=dtype))
        if autocast:
            assert layer(torch.randn(3, 4, dtype=torch.bfloat16)).isfinite().all()
        # Tables may have another dtype than hidden states.
        layer.experts.double()
        assert layer(torch.randn(3, 4)).dtype == torch.float32
        for part in (layer.shared_mlp, layer.router):
            part.double()
            with pytest.raises(TypeError, match=r"parameters, torch.float64, .* got torch.float32"):
                layer(torch.randn(3, 4))


def test_a_hook_may_cast_what_the_shared_mlp_gets() -> None:
    layer = FlashMoE(4, 8, num_experts=9, num_experts_per_tok=2)
    layer.shared_mlp.double().register_forward_pre_hook(lambda _, args: (args[0].double(),))
    assert layer(torch.randn(3, 4)).dtype == torch.float64


def test_output_is_no_view() -> None:
    """In-place operations on a view would lose the hooks of FSDP."""
    experts = FlashExperts(5, 4)
    out = experts(torch.randn(2, 3, 4), torch.zeros(2, 3, 1).long(), torch.ones(2, 3, 1))
    assert out._base is None
    assert out.shape == (2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_device_is_not_used(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # float32 by sparse products, bfloat16 by the reference.
    monkeypatch.setenv("FLASH_MOE_BACKEND", "torch_sparse")
    layer = FlashMoE(8, 6, 9, 2, dtype=dtype)
    few, many = torch.randn(3, 8, dtype=dtype), torch.randn(20, 8, dtype=dtype)
    expected = [layer(few), layer(many)]
    with torch.device("meta"):
        found = [layer(few), layer(many)]
        (found[0].sum() + found[1].sum()).backward()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_on_meta() -> None:
    layer = FlashMoE(8, 6, 9, 2, device="meta")
    out = layer(torch.empty(2, 3, 8, device="meta"))
    assert (out.device.type, out.shape) == ("meta", (2, 3, 8))


def test_version() -> None:
    assert flash_moe.__version__ == flash_moe_dist.__version__
    assert flash_moe.__version__ >= "0.2.0"


def test_layer_built_on_meta_takes_a_state_dict() -> None:
    torch.manual_seed(0)
    layer = FlashMoE(16, 24, num_experts=48, num_experts_per_tok=6)
    with torch.device("meta"):
        empty = FlashMoE(16, 24, num_experts=48, num_experts_per_tok=6)
    later = empty.to_empty(device="cpu")
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
        assert "or pass full_tensor(); to_local() would be this rank's rows" in outcome.message


def call_with_dtensor() -> None:
    experts = FlashExperts(5, 4)
    tables = distribute_tensor(torch.randn(5, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    experts.down_weights = nn.Parameter(tables)
    experts(torch.randn(3, 4), torch.zeros(3, 1).long(), torch.ones(3, 1))

"""Models built on the meta device: first values that do not depend on the number of ranks."""

import pytest
import torch
from ranks import RankPools, rank_runtime
from sharded import whole_parameters
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe import FlashExperts
from flash_moe.layers import normal_rows
from flash_moe_dist import ExpertParallel, materialize
from model import ModelConfig, Transformer

CONFIG = ModelConfig(20, 8, 8, 2, 2, 35, 3)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normal_rows, "BLOCK_ROWS", 8)


def test_a_part_has_the_values_of_the_whole(short_blocks: None) -> None:
    torch.manual_seed(5)
    whole = torch.empty(35, 6)
    normal_rows.normal_rows_(whole, 2.0)
    for first_row, end, first_column in (
        (0, 35, 0),
        (3, 9, 0),
        (16, 24, 2),
        (34, 35, 5),
        (7, 7, 0),
    ):
        torch.manual_seed(5)
        part = torch.empty(end - first_row, 6 - first_column)
        normal_rows.normal_rows_(part, 2.0, first_row, first_column, (35, 6))
        assert torch.equal(part, whole[first_row:end, first_column:])


def test_values_are_normal_and_differ(short_blocks: None) -> None:
    torch.manual_seed(0)
    experts = FlashExperts(4000, 16)
    tables = [table.detach() for table in experts.parameters()]
    for table, std in zip(tables, (0.25, 1.0), strict=True):
        assert table.mean().abs() < 0.02 * std
        assert table.std() == pytest.approx(std, rel=0.02)
        assert len(table.unique()) > 0.99 * table.numel()
    assert not torch.equal(tables[0] * 4, tables[1])
    before = tables[1].clone()
    experts.reset_parameters()
    assert not torch.equal(tables[1], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_values_in_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.empty(300, 7, dtype=dtype)
    normal_rows.normal_rows_(table, 1.0)
    assert table.double().std() == pytest.approx(1.0, rel=0.1)


def built_on_meta(ep_size: int | None, cut_before: bool) -> dict[str, Tensor]:
    runtime = rank_runtime(ep_size)
    with torch.device("meta"):
        model = Transformer(CONFIG)
    parallelize_module(model, runtime.ep_mesh, {"layers.*.moe.experts": ExpertParallel()})
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "meta", name
    if cut_before:
        for layer in model.layers:
            fully_shard(
                layer.get_submodule("moe.experts"),
                mesh=runtime.efsdp_mesh,
                shard_placement_fn=lambda _: Shard(1),
            )
    torch.manual_seed(7)
    materialize(model, runtime.device)
    table = model.layers[0].get_submodule("moe.experts").get_parameter("up_weights")
    assert isinstance(table, DTensor)
    most = -(-35 // runtime.ep_mesh.size()) * 8
    assert table.to_local().numel() <= most / (runtime.efsdp_mesh.size() if cut_before else 1)
    return whole_parameters(model)


@pytest.mark.usefixtures("short_blocks")
def test_values_do_not_depend_on_the_number_of_ranks(rank_pools: RankPools) -> None:
    alone = rank_pools.run(1, built_on_meta, None, False)[0]
    torch.manual_seed(7)
    plain = dict(Transformer(CONFIG).named_parameters())
    for name, value in alone.items():
        assert value.isfinite().all(), name
        assert value.shape == plain[name].shape
    for world_size, ep_size, cut in ((2, 2, False), (3, 3, False), (4, 4, False), (4, 2, True)):
        for found in rank_pools.run(world_size, built_on_meta, ep_size, cut):
            for name, value in found.items():
                assert torch.equal(value, alone[name]), (name, world_size)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_parameters_stay_tied() -> None:
    with torch.device("meta"):
        model = Tied()
    materialize(model, "cpu")
    assert model.head.weight is model.embedding.weight
    assert len(list(model.parameters())) == 1


def module_without_reset() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"own": nn.Linear(2, 2)})
        model["own"].scale = nn.Parameter(torch.ones(2))
        model["own"].inner = WithoutReset()
    materialize(model, "cpu")


class WithoutReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3), persistent=False)


def test_a_module_that_cannot_reset_itself_is_named(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(1, module_without_reset):
        assert outcome.kind == "ValueError"
        assert "WithoutReset at 'own.inner' has none" in outcome.message

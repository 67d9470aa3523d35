"""Sharding arithmetic, what a rank sends where, how many bytes that is, and by which dispatcher."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import make_case
from ranks import RankPools
from sharded import shard_experts
from torch import Tensor

from flash_moe_dist.dispatch.collectives import ALL_GATHER_COLLECTIVE, ALL_TO_ALL_COLLECTIVE
from flash_moe_dist.dispatch.comm_volume import (
    ElementSizes,
    PassVolume,
    bytes_handed,
    cheaper_dispatcher,
    expected_fan_out,
)
from flash_moe_dist.dispatch.exact import sum_row_copies
from flash_moe_dist.dispatch.handshake import _Columns
from flash_moe_dist.dispatch.header import Header
from flash_moe_dist.dispatch.message import ExactLayout, pack, unpack
from flash_moe_dist.dispatch.partition import experts_per_rank, num_local_experts
from flash_moe_dist.dispatch.routing import Routing


@pytest.mark.parametrize("num_experts", [0, 1, 2, 5, 8, 100])
@pytest.mark.parametrize("ep_size", [1, 2, 3, 7])
def test_owners_are_those_of_chunk(num_experts: int, ep_size: int) -> None:
    size = experts_per_rank(num_experts, ep_size)
    owned = [len(chunk) for chunk in torch.arange(num_experts).chunk(ep_size)]
    owned = [] if num_experts == 0 else owned
    counts = [num_local_experts(num_experts, ep_size, rank) for rank in range(ep_size)]
    assert counts == owned + [0] * (ep_size - len(owned))
    for rank, experts in enumerate(torch.arange(num_experts).chunk(ep_size)):
        assert all(expert // size == rank for expert in experts.tolist())


IN_KERNELS = pytest.mark.parametrize("in_kernels", [True, False], ids=["in kernels", "in torch"])


def header_of(routing: Routing) -> Tensor:
    header_WF = torch.zeros(len(routing.pairs_WT), len(Header), dtype=torch.int64)
    header_WF = header_WF.to(routing.ids_N.device)
    routing.write_header(header_WF, checksum=17)
    return header_WF


def test_columns_of_headers_are_in_the_order_of_the_fields() -> None:
    assert [name.upper() for name in _Columns._fields] == [field.name for field in Header]


def bits(weight: float) -> int:
    return int(torch.tensor(weight).view(torch.int32))


@IN_KERNELS
def test_worked_example(in_kernels: bool, device: torch.device) -> None:
    """The example in the docstring of flash_moe_dist.dispatch.message."""
    indices_TK = torch.tensor([[3, 0], [1, 0], [2, -1]], device=device)
    weights_TK = torch.tensor([[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]], device=device)
    routing = Routing.from_indices(indices_TK, num_experts=4, ep_size=2, in_kernels=in_kernels)
    header_WF = header_of(routing)
    assert header_WF.tolist() == [[2, 3, 0, 3, 17, 3], [2, 2, 0, 3, 17, 3]]
    layout = ExactLayout([2, 2], [3, 2], torch.float32, all_rows=False)
    sent = pack(routing, weights_TK, layout)
    first = [1, 3, 0, 0, 1, bits(1.5), bits(3.5), bits(2.5)]
    second = [1, 2, 1, 0, bits(0.5), bits(4.5)]
    assert sent.message.tolist() == first + second
    assert layout.splits == [8, 6]
    assert sent.slots_P.tolist() == [1, 3, 2, 0, 4]
    assert sent.tokens_S is not None
    assert sent.tokens_S.tolist() == [0, 1, 0, 2]
    assert sent.sent_TW is not None
    assert sent.sent_TW.tolist() == [[0, 2], [1, -1], [-1, 3]]
    offsets, ids, weights = unpack(sent.message, header_WF, layout, in_kernels)
    assert offsets.tolist() == [0, 1, 3, 4, 5]
    assert ids.tolist() == [0, 0, 1, 1, 0]
    assert weights.tolist() == [1.5, 3.5, 2.5, 0.5, 4.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("all_rows", [False, True], ids=["chosen rows", "all rows"])
@pytest.mark.parametrize(
    ("slots", "ep_size"),
    # None at all; more than one block of pairs, more ranks than experts, three ranks.
    [(0, 2), (200, 2), (5, 60), (7, 3)],
)
def test_kernels_pack_as_torch_does(
    slots: int,
    ep_size: int,
    all_rows: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = make_case(6, 4, 41, slots, dtype, device)
    case.indices[:, ::3] = -1
    case.indices[1] = 40
    found = []
    for in_kernels in (True, False):
        routing = Routing.from_indices(case.indices, 41, ep_size, in_kernels)
        header_WF = header_of(routing)
        rows, pairs, *_ = header_WF.t().tolist()
        rows = [9] * ep_size if all_rows else rows
        layout = ExactLayout(rows, pairs, dtype, all_rows)
        sent = pack(routing, case.routing_weights.detach(), layout)
        # Back from the message, as if each rank had sent this one's.
        received = unpack(sent.message, header_WF, layout, in_kernels)
        found.append((header_WF, sent, received))
    (header_WF, one, received), (other_header_WF, other, other_received) = found
    assert torch.equal(header_WF, other_header_WF)
    assert all(map(torch.equal, received, other_received))
    assert one.message.shape == other.message.shape
    # What is sent for rows that there are not does not matter.
    names = ("slots_P", "tokens_S", "sent_TW", *(() if all_rows else ("message",)))
    for name in names:
        tensor, expected = getattr(one, name), getattr(other, name)
        assert (tensor is None) == (expected is None)
        assert tensor is None or torch.equal(tensor, expected)
    offsets, ids, weights = received
    assert offsets[-1] == len(ids)
    assert torch.equal(weights, case.routing_weights.detach().flatten()[one.slots_P])
    owners = torch.arange(ep_size, device=device).repeat_interleave(
        torch.tensor(pairs, device=device)
    )
    whole = ids + owners * experts_per_rank(41, ep_size)
    assert torch.equal(whole, case.indices.flatten()[one.slots_P])


@pytest.mark.parametrize("backend", ["gather", "hot_cold", "dense"])
def test_sum_of_returned_rows_with_any_triton_backend(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", backend)
    sent_TW = torch.tensor([[0, 2], [1, -1], [-1, 3]], device=device)
    rows_SH = torch.randn(4, 6, device=device)
    sums_TH = sum_row_copies(rows_SH, sent_TW, torch.float32)
    assert torch.equal(sums_TH, torch.stack([rows_SH[0] + rows_SH[2], rows_SH[1], rows_SH[3]]))


@IN_KERNELS
def test_ids_out_of_range_are_counted_and_sent_nowhere(
    in_kernels: bool, device: torch.device
) -> None:
    indices_TK = torch.tensor([[4, 0], [-2, 3]], device=device)
    routing = Routing.from_indices(indices_TK, num_experts=4, ep_size=3, in_kernels=in_kernels)
    assert header_of(routing)[:, :3].tolist() == [[1, 1, 2], [1, 1, 2], [0, 0, 2]]


@dataclass
class Recorded:
    """Bytes handed to each collective, by the order of the calls."""

    calls: list[tuple[str, int]] = field(default_factory=list)

    def patched(self, patch: pytest.MonkeyPatch) -> None:
        for name in (ALL_TO_ALL_COLLECTIVE, ALL_GATHER_COLLECTIVE):
            patch.setattr(dist, name, self._recording(name, getattr(dist, name)))
        for name in (
            "reduce_scatter_tensor",
            "all_reduce",
            "all_gather",
            "all_gather_object",
            "broadcast",
            "barrier",
        ):
            patch.setattr(dist, name, self._unexpected(name))

    def _recording(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def record(out: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, given.numel() * given.element_size()))
            return collective(out, given, *args, **kwargs)

        return record

    def _unexpected(self, name: str) -> Callable[..., Any]:
        def unexpected(*args: Any, **kwargs: Any) -> None:
            raise AssertionError(f"{name} is in no formula")

        return unexpected


def count_bytes(dispatcher: str, dtype: torch.dtype) -> tuple[int, int]:
    """Hold what a forward and a backward pass send against the formula; return both sums."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    num_experts, hidden_size, slots = 23, 12, 3
    tokens = [(4, 7, 0, 10)[one] for one in range(world_size)]
    cases = [
        make_case(count, hidden_size, num_experts, slots, dtype, seed=one)
        for one, count in enumerate(tokens)
    ]
    for case in cases:
        case.indices[:1] = -1
    # By counting in Python, not with what is tested.
    size = experts_per_rank(num_experts, world_size)
    owners = [
        [[expert // size for expert in row if expert >= 0] for row in case.indices.tolist()]
        for case in cases
    ]
    load = PassVolume(
        rows_sent=sum(len(set(row)) for row in owners[rank]),
        rows_received=sum(rank in row for one in owners for row in one),
        pairs_sent=sum(len(row) for row in owners[rank]),
        pairs_received=sum(row.count(rank) for one in owners for row in one),
        max_tokens=max(tokens),
    )
    weight_bytes = cases[0].routing_weights.element_size()
    widths = ElementSizes(world_size, hidden_size, dtype.itemsize, 4, weight_bytes)
    name = "all_gather" if dispatcher == "all_gather" else "all_to_all"
    expected = bytes_handed(name, widths, load)  # type: ignore[arg-type]

    mine = cases[rank]
    experts = shard_experts(mine, dispatcher)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for run in (0, 1):
            recorded = Recorded()
            recorded.patched(patch)
            if run == 0:
                out = experts(mine.hidden_states, mine.indices, mine.routing_weights)
            else:
                out.backward(mine.grad)
            patch.undo()
            found.append(recorded.calls)
    rows = ALL_GATHER_COLLECTIVE if dispatcher == "all_gather" else ALL_TO_ALL_COLLECTIVE
    assert sorted(found[0]) == sorted(
        [
            (ALL_TO_ALL_COLLECTIVE, expected[0]["headers"]),
            (ALL_TO_ALL_COLLECTIVE, expected[0]["pairs"]),
            (rows, expected[0]["rows"]),
            (ALL_TO_ALL_COLLECTIVE, expected[0]["sums"]),
        ]
    )
    assert sorted(found[1]) == sorted(
        [
            (ALL_TO_ALL_COLLECTIVE, expected[1]["pairs"]),
            (rows, expected[1]["rows"]),
            (ALL_TO_ALL_COLLECTIVE, expected[1]["sums"]),
        ]
    )
    return sum(expected[0].values()), sum(expected[1].values())


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_handed_to_collectives_are_those_of_the_formula(
    dispatcher: str, dtype: torch.dtype, world_size: int, rank_pools: RankPools
) -> None:
    rank_pools.run(world_size, count_bytes, dispatcher, dtype)


def test_formula_of_bytes_with_numbers() -> None:
    """Numbers by hand: 2 ranks, H = 10, bfloat16; 6 of 7 tokens go to one rank, 5 to the other."""
    widths = ElementSizes(ep_size=2, hidden_size=10, hidden_bytes=2, sum_bytes=4, weight_bytes=2)
    load = PassVolume(rows_sent=11, rows_received=9, pairs_sent=20, pairs_received=18, max_tokens=7)
    forward, backward = bytes_handed("all_to_all", widths, load)
    assert forward == {"headers": 96, "pairs": 44 + 160, "rows": 220, "sums": 360}
    assert backward == {"rows": 220, "sums": 360, "pairs": 36}
    forward, backward = bytes_handed("all_gather", widths, load)
    assert forward == {"headers": 96, "pairs": 56 + 160, "rows": 140, "sums": 560}
    assert backward == {"rows": 140, "sums": 560, "pairs": 36}


def test_expected_fan_out_is_that_of_drawn_experts() -> None:
    draw = torch.Generator().manual_seed(0)
    for ep_size, slots in ((2, 3), (8, 8), (64, 16)):
        owners = torch.randint(ep_size, (20_000, slots), generator=draw)
        used = torch.zeros(20_000, ep_size).scatter_(1, owners, 1.0).sum(1).mean()
        assert expected_fan_out(ep_size, slots) == pytest.approx(float(used), rel=0.01)


def test_gathering_is_chosen_where_tokens_use_nearly_all_ranks() -> None:
    def chosen(ep_size: int, slots: int) -> str:
        return cheaper_dispatcher(ElementSizes(ep_size, 1024, 2, 4, 2), slots)

    assert [chosen(2, slots) for slots in (0, 1, 2, 8, 512)] == ["all_to_all"] * 3 + [
        "all_gather"
    ] * 2
    assert chosen(8, 8) == "all_to_all"
    assert chosen(8, 64) == "all_gather"
    assert chosen(512, 64) == "all_to_all"


def chosen_by_auto() -> list[str]:
    names = []
    for slots in (1, 20):
        case = make_case(dist.get_rank(), 12, 23, slots)
        experts = shard_experts(make_case(1, 12, 23, slots), "auto")
        recorded = Recorded()
        with pytest.MonkeyPatch.context() as patch:
            recorded.patched(patch)
            experts(case.hidden_states, case.indices, case.routing_weights)
        gathers = any(name == ALL_GATHER_COLLECTIVE for name, _ in recorded.calls)
        names.append("all_gather" if gathers else "all_to_all")
    return names


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_auto_chooses_by_shapes_alike_on_every_rank(world_size: int, rank_pools: RankPools) -> None:
    chosen = rank_pools.run(world_size, chosen_by_auto)
    assert chosen == [["all_to_all", "all_gather"]] * world_size


def calls_on_one_rank() -> list[Any]:
    case = make_case(4, 12, 23, 3)
    experts = shard_experts(case, "auto")
    recorded = Recorded()
    with pytest.MonkeyPatch.context() as patch:
        recorded.patched(patch)
        experts(case.hidden_states, case.indices, case.routing_weights).backward(case.grad)
    return recorded.calls


def test_one_rank_calls_no_collective(rank_pools: RankPools) -> None:
    assert rank_pools.run(1, calls_on_one_rank) == [[]]

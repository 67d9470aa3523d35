"""Sharding arithmetic, and what a rank sends where."""

import pytest
import torch

from flash_moe_dist.dispatch import _Routing, _sum_rows
from flash_moe_dist.sharding import experts_per_rank


@pytest.mark.parametrize("num_experts", [0, 1, 2, 5, 8, 100])
@pytest.mark.parametrize("ep_size", [1, 2, 3, 7])
def test_owners_are_those_of_chunk(num_experts: int, ep_size: int) -> None:
    size = experts_per_rank(num_experts, ep_size)
    for rank, owned in enumerate(torch.arange(num_experts).chunk(ep_size)):
        assert all(expert // size == rank for expert in owned.tolist())


def test_worked_example() -> None:
    """The example in the docstring of flash_moe_dist.dispatch."""
    indices_TK = torch.tensor([[3, 0], [1, 0], [2, -1]])
    routing = _Routing.of(indices_TK, num_experts=4, ep_size=2)
    assert routing.counts_3W.tolist() == [[2, 2], [3, 2], [0, 0]]
    to_send = routing.to_send(num_rows=4, num_pairs=5)
    assert to_send.rows.tokens.tolist() == [0, 1, 0, 2]
    assert to_send.pairs_per_row.tolist() == [1, 2, 1, 1]
    assert to_send.local_ids.tolist() == [0, 0, 1, 1, 0]
    assert to_send.slots.tolist() == [1, 3, 2, 0, 4]
    pattern = to_send.rows.pattern
    assert pattern.expert_ids.view(3, 2).tolist() == [[0, 2], [1, -1], [-1, 3]]


@pytest.mark.parametrize("backend", ["gather", "hot_cold", "dense"])
def test_sum_of_returned_rows_with_any_triton_backend(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", backend)
    routing = _Routing.of(torch.tensor([[3, 0], [1, 0], [2, -1]], device=device), 4, 2)
    rows_SH = torch.randn(4, 6, device=device)
    sums_TH = _sum_rows(rows_SH, routing.to_send(4, 5).rows)
    assert torch.equal(sums_TH, torch.stack([rows_SH[0] + rows_SH[2], rows_SH[1], rows_SH[3]]))


def test_ids_out_of_range_are_counted_and_sent_nowhere() -> None:
    routing = _Routing.of(torch.tensor([[4, 0], [-2, 3]]), num_experts=4, ep_size=3)
    assert routing.counts_3W.tolist() == [[1, 1, 0], [1, 1, 0], [2, 2, 2]]

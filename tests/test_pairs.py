"""The pair pattern's derived arrays."""

import doctest

import pytest
import torch

from flash_moe.ops import pairs
from flash_moe.ops.pairs import Pairs


def test_worked_example() -> None:
    results = doctest.testmod(pairs, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


def test_occupied_leaves_empty_slots_out() -> None:
    pattern = Pairs(torch.tensor([0, 1, 1, 4]), torch.tensor([-1, 2, -1, 0]).int(), 3)
    full, kept = pattern.occupied
    assert kept is not None
    assert kept.tolist() == [1, 3]
    assert full.row_offsets.tolist() == [0, 0, 0, 2]
    assert full.expert_ids.tolist() == [2, 0]


def test_occupied_is_the_pattern_itself_without_empty_slots() -> None:
    pattern = Pairs.from_slots(torch.tensor([[1, 0], [2, 2]]), 3)
    assert pattern.occupied == (pattern, None)
    assert pattern.row_offsets.tolist() == [0, 2, 4]


def test_sorting_in_chunks_gives_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(-1, 9, (50,), generator=torch.Generator().manual_seed(0)).int()
    whole = Pairs(torch.tensor([0, 50]), ids, 9)
    expected = whole.expert_order, whole.expert_offsets
    monkeypatch.setattr(pairs, "SORT_LIMIT", 7)
    chunked = Pairs(torch.tensor([0, 50]), ids, 9)
    assert torch.equal(chunked.expert_order, expected[0])
    assert torch.equal(chunked.expert_offsets, expected[1])


def test_tokens_of_bad_offsets_stay_inside() -> None:
    tokens = Pairs(torch.tensor([3, 1, 9]), torch.zeros(6).int(), 1).token_ids
    assert tokens.min() >= 0
    assert tokens.max() <= 1

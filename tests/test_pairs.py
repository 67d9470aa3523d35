"""The pair pattern's derived arrays."""

import doctest

import pytest
import torch

from flash_moe.ops import pairs
from flash_moe.ops.flash_expert import ForwardOutputs
from flash_moe.ops.pairs import Pairs, SavedPairs


def test_the_forward_op_returns_the_output_and_then_what_is_saved() -> None:
    assert ForwardOutputs._fields[1:] == SavedPairs._fields


def test_worked_example() -> None:
    results = doctest.testmod(pairs, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


def test_occupied_leaves_empty_slots_out() -> None:
    pattern = Pairs.from_checked_offsets(
        torch.tensor([0, 1, 1, 4]), torch.tensor([-1, 2, -1, 0]).int(), 3
    )
    full, positions = pattern.occupied
    assert positions is not None
    assert positions.tolist() == [1, 3]
    assert full.row_offsets.tolist() == [0, 0, 0, 2]
    assert full.expert_ids.tolist() == [2, 0]


def test_occupied_is_the_pattern_itself_without_empty_slots() -> None:
    pattern = Pairs.from_checked_indices(torch.tensor([[1, 0], [2, 2]]), 3)
    assert pattern.occupied == (pattern, None)
    assert pattern.row_offsets.tolist() == [0, 2, 4]


def test_sorting_in_chunks_gives_the_same_order() -> None:
    ids = torch.randint(-1, 9, (50,), generator=torch.Generator().manual_seed(0)).int()
    whole = Pairs.from_checked_offsets(torch.tensor([0, 50]), ids, 9)
    expected = whole.expert_order, whole.expert_offsets
    with pairs.tuning(sort_limit=7):
        chunked = Pairs.from_checked_offsets(torch.tensor([0, 50]), ids, 9)
        assert torch.equal(chunked.expert_order, expected[0])
    assert torch.equal(chunked.expert_offsets, expected[1])


def test_tokens_of_bad_offsets_stay_inside() -> None:
    pattern = Pairs.from_checked_offsets(torch.tensor([3, 1, 9]), torch.zeros(6).int(), 1)
    tokens = pattern.token_ids
    assert tokens.min() >= 0
    assert tokens.max() <= 1


@pytest.mark.parametrize("top_k", [0, 2])
def test_saved_pairs_restore_the_pattern(top_k: int) -> None:
    indices = torch.tensor([[1, 0], [2, -1], [0, 2]])[:, :top_k]
    pattern = Pairs.from_indices(indices, 3, "reference")
    saved = pattern.saved(torch.zeros(3 * top_k))
    restored = Pairs.from_saved(saved, 3, top_k)
    assert restored.num_tokens == pattern.num_tokens == 3
    assert torch.equal(restored.expert_ids, pattern.expert_ids)
    assert restored.tile_pairs == pattern.tile_pairs == top_k


def test_saved_pairs_of_ids_that_are_longer_than_the_last_offset() -> None:
    offsets, ids = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1, 77, -9]).int()
    pattern = Pairs.from_checked_offsets(offsets, ids, 3, tile_pairs=4)
    saved = pattern.saved(torch.arange(5.0)).first(3)
    assert saved.scores.tolist() == [0, 1, 2]
    restored = Pairs.from_saved(saved, 3, tile_pairs=4)
    assert restored.expert_ids.tolist() == [2, 0, 1]
    assert restored.row_offsets.tolist() == [0, 1, 3]
    assert restored.tile_pairs == pattern.tile_pairs == 4

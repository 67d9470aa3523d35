"""The three primitives against dense matrix products, in every backend."""

from functools import partial

import pytest
import torch
from cases import TOLERANCES, assert_close
from torch import Tensor

from flash_moe.ops.backend_choice import check_backend
from flash_moe.ops.backends import Backend, gather, load_backend
from flash_moe.ops.overlap import InputChunk, OutputChunk, WholeOutput
from flash_moe.ops.pairs import Pairs

NUM_EXPERTS, HIDDEN_SIZE = 11, 37
ROW_OFFSETS = [0, 3, 3, 12, 13]
EXPERT_IDS = [4, -1, 4, 0, 1, 2, 3, -1, 9, 8, 7, 0, 10]


def pattern(device: torch.device) -> tuple[Pairs, Tensor]:
    """A ragged pattern with an empty row, duplicates and empty slots; token of each pair."""
    pairs = Pairs.from_checked_offsets(
        torch.tensor(ROW_OFFSETS, device=device),
        torch.tensor(EXPERT_IDS, device=device, dtype=torch.int32),
        NUM_EXPERTS,
    )
    return pairs, torch.repeat_interleave(torch.tensor(ROW_OFFSETS).diff()).to(device)


def spmm(
    primitives: Backend, values_N: Tensor, table_EH: Tensor, pairs: Pairs, dtype: torch.dtype
) -> Tensor:
    out = WholeOutput((pairs.num_tokens, table_EH.shape[1]), dtype, table_EH.device)
    primitives.spmm(values_N, table_EH, pairs, out.chunks)
    return out.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch_sparse", "gather"])
def test_primitives(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    where = device if backend == "gather" else torch.device("cpu")
    primitives = load_backend(backend)
    pairs, tokens_N = pattern(where)
    draw = torch.Generator().manual_seed(0)
    rows_TH = torch.randn(4, HIDDEN_SIZE, generator=draw).to(where, dtype)
    table_EH = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=draw).to(where, dtype)
    values_N = torch.randn(len(EXPERT_IDS), generator=draw).to(where)
    occupied = pairs.expert_ids >= 0
    ids_N = pairs.expert_ids.long().clamp(min=0)
    matrix_TE = torch.zeros(4, NUM_EXPERTS, dtype=torch.float64, device=where)
    matrix_TE.index_put_((tokens_N, ids_N), (values_N * occupied).double(), accumulate=True)

    products_TE = rows_TH.double() @ table_EH.double().t()
    scores_N = primitives.sddmm(rows_TH, table_EH, pairs)
    assert_close(scores_N, products_TE[tokens_N, ids_N] * occupied, 1e-6, "sddmm")
    summed_TH = spmm(primitives, values_N, table_EH, pairs, dtype)
    assert summed_TH.dtype == dtype
    assert_close(summed_TH, matrix_TE @ table_EH.double(), TOLERANCES[dtype], "spmm")
    summed_EH = primitives.spmm_t(values_N, rows_TH, pairs, dtype)
    assert summed_EH.dtype == dtype
    assert_close(summed_EH, matrix_TE.t() @ rows_TH.double(), TOLERANCES[dtype], "spmm_t")


def test_tokens_in_the_order_by_expert(device: torch.device) -> None:
    """The numbers in the docstring of `gather.tokens_by_expert`."""
    offsets, ids = torch.tensor([0, 1, 4]), torch.tensor([2, 0, -1, 2]).int()
    pairs = Pairs.from_checked_offsets(offsets.to(device), ids.to(device), 3)
    assert pairs.expert_order.tolist() == [2, 1, 0, 3]
    assert gather.tokens_by_expert(pairs).tolist() == [1, 1, 0, 1]


SPLITS = {"spmm_t_split_pairs": 1}
# 13 pairs of 11 experts are few.
NARROW_BLOCKS = {
    "spmm_t_cached_bytes": 1,
    "spmm_t_min_hidden": 32,
    "spmm_t_narrow_hidden": 16,
    "spmm_t_warp_hidden": 16,
    "spmm_t_narrow_min_pairs": 1,
}


@pytest.mark.parametrize(
    ("changes", "block_hidden"), [(SPLITS, 64), (NARROW_BLOCKS, 16)], ids=["splits", "narrow"]
)
def test_sums_for_experts_of_ragged_rows(
    changes: dict[str, int], block_hidden: int, device: torch.device
) -> None:
    pairs, tokens_N = pattern(device)
    draw = torch.Generator().manual_seed(0)
    values_2N = torch.randn(2, len(EXPERT_IDS), generator=draw).to(device)
    rows_2TH = torch.randn(2, 4, HIDDEN_SIZE, generator=draw).to(device)
    dtypes = (torch.float32, torch.float32)
    first, second = values_2N
    with gather.tuning(**changes):
        assert gather.spmm_t_block_hidden(pairs, HIDDEN_SIZE, element_bytes=8) == block_hidden
        sums = gather.spmm_t_both((first, second), (rows_2TH[0], rows_2TH[1]), pairs, dtypes, 0.5)
    for values_N, rows_TH, sums_EH in zip(values_2N, rows_2TH, sums, strict=True):
        expected_EH = torch.zeros(NUM_EXPERTS, HIDDEN_SIZE, dtype=torch.float64, device=device)
        weights_N = 0.5 * values_N * (pairs.expert_ids >= 0)
        products_NH = weights_N.double().unsqueeze(1) * rows_TH[tokens_N].double()
        expected_EH.index_add_(0, pairs.expert_ids.long().clamp(min=0), products_NH)
        assert_close(sums_EH, expected_EH, 1e-6, "spmm_t")


@pytest.mark.parametrize("hidden_size", [HIDDEN_SIZE, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("min_split_pairs", [1, 16], ids=["splits", "whole"])
@pytest.mark.parametrize("own_index", range(3))
def test_output_chunks(
    own_index: int,
    min_split_pairs: int,
    dtype: torch.dtype,
    hidden_size: int,
    device: torch.device,
) -> None:
    """Accumulated bit by bit as a sum over all is, whatever stood at the own index.

    All are in float32, those of tables in float64 too.
    """
    with gather.tuning(spmm_min_split_pairs=min_split_pairs):
        pairs, _ = pattern(device)
        assert (gather.spmm_splits(pairs, blocks=1) > 1) == (min_split_pairs == 1)
        check_output_chunks("gather", pairs, own_index, dtype, hidden_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch_sparse"])
def test_output_chunks_of_backends_that_compute_all_rows_at_once(
    backend: str, dtype: torch.dtype
) -> None:
    pairs, _ = pattern(torch.device("cpu"))
    check_output_chunks(backend, pairs, 1, dtype, HIDDEN_SIZE)


def check_output_chunks(
    backend: str, pairs: Pairs, own_index: int, dtype: torch.dtype, hidden_size: int
) -> None:
    device = pairs.expert_ids.device
    primitives = load_backend(backend)
    draw = torch.Generator().manual_seed(0)
    values_N = torch.randn(len(EXPERT_IDS), generator=draw).to(device)
    table_EH = torch.randn(NUM_EXPERTS, hidden_size, generator=draw).to(device, dtype)
    others_PXH = torch.randn(3, 3, hidden_size, generator=draw).to(device)
    own_TH = spmm(primitives, values_N, table_EH, pairs, torch.float32)

    others_PXH[own_index] = own_TH[1:]
    out_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    expected_XH = (others_PXH[0] + others_PXH[1] + others_PXH[2]).to(out_dtype)
    if backend == "gather":
        expected_XH = gather.add_partial_sums(others_PXH, out_dtype)
    assert_close(expected_XH, others_PXH.double().sum(0), TOLERANCES[out_dtype], "sum")
    others_PXH[own_index] = torch.nan
    first_TH = torch.empty(1, hidden_size, device=device)
    rest_XH = torch.empty(3, hidden_size, device=device, dtype=out_dtype)
    written: list[str] = []
    chunks = [
        OutputChunk(slice(0, 1), first_TH, lambda: written.append("first")),
        OutputChunk(slice(1, 4), rest_XH, lambda: written.append("rest"), others_PXH, own_index),
    ]
    primitives.spmm(values_N, table_EH, pairs, lambda: chunks)
    assert written == ["first", "rest"]
    assert torch.equal(first_TH, own_TH[:1])
    assert torch.equal(rest_XH, expected_XH)


@pytest.mark.parametrize("backend", ["reference", "torch_sparse", "gather"])
def test_input_chunks(backend: str, device: torch.device) -> None:
    """Rows are read after their chunk was waited for, in the order of the chunks."""
    where = device if backend == "gather" else torch.device("cpu")
    primitives = load_backend(backend)
    pairs, _ = pattern(where)
    draw = torch.Generator().manual_seed(0)
    rows_TH = torch.randn(4, HIDDEN_SIZE, generator=draw).to(where)
    table_EH = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=draw).to(where)
    expected_N = primitives.sddmm(rows_TH, table_EH, pairs)
    arriving_TH = torch.full_like(rows_TH, torch.nan)
    waited: list[slice] = []

    def arrive(rows: slice) -> None:
        waited.append(rows)
        arriving_TH[rows] = rows_TH[rows]

    for order in ([slice(0, 4)], [slice(2, 4), slice(0, 0), slice(0, 2)]):
        arriving_TH.fill_(torch.nan)
        waited.clear()
        chunks = [InputChunk(rows, partial(arrive, rows)) for rows in order]
        assert torch.equal(primitives.sddmm(arriving_TH, table_EH, pairs, chunks), expected_N)
        assert waited == order


def test_sparse_backend_without_mkl_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    primitives = load_backend("torch_sparse")
    pairs, _ = pattern(torch.device("cpu"))
    table_EH, values_N = torch.randn(NUM_EXPERTS, HIDDEN_SIZE), torch.randn(len(EXPERT_IDS))
    rows_TH = torch.randn(4, HIDDEN_SIZE)

    def results() -> list[Tensor]:
        return [
            primitives.sddmm(rows_TH, table_EH, pairs),
            spmm(primitives, values_N, table_EH, pairs, torch.float32),
            primitives.spmm_t(values_N, rows_TH, pairs, torch.float32),
        ]

    with_mkl = results()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    for one, other in zip(with_mkl, results(), strict=True):
        assert_close(one, other, 1e-6, "without MKL")


def test_backend_must_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'gather' takes CUDA tensors"):
        check_backend("gather", torch.device("cpu"))
    with pytest.raises(ValueError, match="'torch_sparse' takes tensors on the CPU, got cuda"):
        check_backend("torch_sparse", torch.device("cuda"))


def test_scores_do_not_keep_the_matrix_alive() -> None:
    pairs, _ = pattern(torch.device("cpu"))
    for num_experts in (NUM_EXPERTS, 3):
        ids = pairs.expert_ids.clamp(0, num_experts - 1)
        scores = load_backend("torch_sparse").sddmm(
            torch.randn(4, 5),
            torch.randn(num_experts, 5),
            Pairs.from_checked_offsets(pairs.row_offsets, ids, num_experts),
        )
        assert not scores._is_view()


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert (torch.ones(2).new_empty(3, dtype=torch.int32) < -(2**30)).all()

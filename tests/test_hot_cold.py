"""Hot experts by matrix products, and everything dense: right, bounded and repeatable."""

from collections.abc import Callable

import pytest
import torch
from cases import INTERPRETED_TOLERANCES, RESULTS, Case, assert_close, make_case, oracle
from torch import Tensor

from flash_moe import triton_flash_expert_func
from flash_moe.ops import hot_experts
from flash_moe.ops.backend_choice import cheapest_backend, hot_threshold
from flash_moe.ops.backends import dense, gather, hot_cold
from flash_moe.ops.hot_experts import HotPairs, hot_workspace_size, partition_hot_pairs
from flash_moe.ops.indices import check_and_sort

NUM_TOKENS, NUM_EXPERTS, SLOTS = 9, 23, 8
# A value is rounded before its product, and the sum of products once more.
ROUNDINGS = 2


def uniform() -> Tensor:
    return torch.randint(NUM_EXPERTS, (NUM_TOKENS, SLOTS), generator=torch.Generator())


def one_expert() -> Tensor:
    return torch.full((NUM_TOKENS, SLOTS), 7)


def skewed() -> Tensor:
    """Two experts that all tokens use, one of them several times; empty slots; an empty token."""
    ids = uniform()
    ids[:, 0] = 22
    ids[:, 3:6] = 2
    ids[4, 2] = ids[5, 0] = ids[5, 7] = -1
    ids[7] = -1
    return ids


def distinct() -> Tensor:
    return torch.stack([torch.randperm(NUM_EXPERTS)[:SLOTS] for _ in range(NUM_TOKENS)])


ROUTINGS: dict[str, Callable[[], Tensor]] = {
    "uniform": uniform,
    "one expert": one_expert,
    "skewed": skewed,
    "distinct": distinct,
}


def results(case: Case, backend: str) -> list[Tensor]:
    out = triton_flash_expert_func(*case.args(), backend=backend)
    return [out, *torch.autograd.grad(out, case.differentiable(), case.grad)]


def check(case: Case, backend: str) -> None:
    tolerance = ROUNDINGS * INTERPRETED_TOLERANCES[case.grad.dtype]
    for name, one, exact in zip(RESULTS, results(case, backend), oracle(case), strict=True):
        assert_close(one, exact, tolerance, f"{backend}, {name}")


@pytest.mark.parametrize("hidden_size", [40, 130])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("threshold", [1, 4, 9, 100])
def test_hot_cold(
    routing: str,
    threshold: int,
    hidden_size: int,
    device: torch.device,
) -> None:
    """Thresholds at which all, some, hardly any and no experts are hot."""
    ids = ROUTINGS[routing]()
    shape = (NUM_TOKENS, hidden_size, NUM_EXPERTS, SLOTS)
    with hot_experts.tuning(threshold=threshold):
        check(make_case(*shape, torch.float16, device, indices=ids), "hot_cold")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_dense(routing: str, dtype: torch.dtype, device: torch.device) -> None:
    ids = ROUTINGS[routing]()
    check(make_case(NUM_TOKENS, 40, NUM_EXPERTS, SLOTS, dtype, device, indices=ids), "dense")


@pytest.mark.parametrize("backend", ["hot_cold", "dense"])
def test_several_ranges_of_experts(backend: str, device: torch.device) -> None:
    """200 experts, of which 150 are hot, in ranges of 128 hot ones, or of any 30."""
    ids = torch.randperm(200)[:150].view(5, 30)
    with (
        hot_experts.tuning(threshold=1),
        hot_cold.tuning(matrix_elements=128 * len(ids)),
        dense.tuning(matrix_elements=30 * len(ids)),
    ):
        check(make_case(5, 24, 200, 30, torch.float16, device, indices=ids), backend)


@pytest.mark.parametrize("backend", ["hot_cold", "dense"])
def test_many_repeats_in_blocks(backend: str, device: torch.device) -> None:
    """Runs of one expert that go on from block to block, and end with a block."""
    ids = torch.tensor([[3] * 20 + [5] * 9, [1] * 8 + [2] * 16 + [4] * 5, list(range(29))])
    with (
        hot_experts.tuning(threshold=1),
        hot_cold.tuning(repeat_block=8),
        dense.tuning(block=8),
    ):
        check(make_case(3, 24, 30, 29, torch.float16, device, indices=ids), backend)


@pytest.mark.parametrize("backend", ["hot_cold", "dense", "gather"])
def test_repeatable(backend: str, device: torch.device) -> None:
    case = make_case(NUM_TOKENS, 40, NUM_EXPERTS, SLOTS, torch.float16, device, indices=skewed())
    with hot_experts.tuning(threshold=4):
        first = results(case, backend)
        for _ in range(3):
            for name, one, other in zip(RESULTS, first, results(case, backend), strict=True):
                assert torch.equal(one, other), name


@pytest.mark.parametrize("backend", ["hot_cold", "dense"])
def test_one_gradient_alone(backend: str, device: torch.device) -> None:
    case = make_case(NUM_TOKENS, 40, NUM_EXPERTS, SLOTS, torch.float16, device, indices=skewed())
    _, *expected = results(case, backend)
    for name, leaf, exact in zip(RESULTS[1:], case.differentiable(), expected, strict=True):
        args = [arg if arg is leaf else arg.detach() for arg in case.args()]
        out = triton_flash_expert_func(*args, backend=backend)
        (alone,) = torch.autograd.grad(out, leaf, case.grad)
        assert torch.equal(alone, exact), name


def test_example_of_the_arrays(device: torch.device) -> None:
    """The numbers in the docstring of flash_moe.ops.hot_experts."""
    ids = torch.tensor([[7, 2, 7, 5]], device=device)
    with hot_experts.tuning(threshold=1):
        size = hot_workspace_size(num_tokens=1, top_k=4, num_experts=9)
        workspace = torch.empty(size, device=device, dtype=torch.int32)
        hot = HotPairs.in_workspace(workspace, num_tokens=1, top_k=4, num_experts=9)
        counts = hot.zero_token_counts()
        ids_N, slot_order = check_and_sort(ids, 9, True, counts)
        assert slot_order is not None
        assert counts.tolist() == [0, 0, 1, 0, 0, 1, 0, 1, 0]
        counts[5] = 0
        partition_hot_pairs(hot, ids_N, slot_order, top_k=4)
    assert ids_N.tolist() == [5, -4, -9, -9]
    assert slot_order.tolist() == [3, 1, 0, 2]
    assert hot.pair_counts.tolist() == [[1, 2, 1]]
    assert hot.bitmaps.tolist() == [[3 + ((1 + 2) << 32)]]
    assert hot.hot_index.tolist() == [-1, -1, 0, -1, -1, -1, -1, 1, -1]
    assert hot.experts[: int(hot.num_hot)].tolist() == [2, 7]


def test_experts_with_more_pairs_than_a_split(device: torch.device) -> None:
    """Splits of 4 pairs: experts that begin, end or lie across their bounds."""
    for loads in ([30], [4, 5, 4], [5, 5, 6, 1], [3, 0, 9, 2, 8], [1, 1, 4, 4, 12]):
        ids = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
        ids = ids[torch.randperm(len(ids))].unsqueeze(1)
        case = make_case(len(ids), 40, len(loads), 1, torch.float32, device, indices=ids)
        with gather.tuning(spmm_t_split_pairs=4):
            check(case, "gather")


def test_rows_in_several_slices(device: torch.device) -> None:
    """Rows of 8 bytes times 700: six slices of 1 KB, the last one cut off."""
    check(make_case(3, 700, 20, 9, torch.float64, device), "gather")


def test_choice_of_backend() -> None:
    """The choice depends on shapes alone: T, K, E, H and bytes of an element."""
    assert cheapest_backend(1024, 512, 102_400, 1024, 2) == "gather"
    assert cheapest_backend(4096, 512, 102_400, 1024, 2) == "hot_cold"
    assert cheapest_backend(1024, 4096, 102_400, 1024, 2) == "dense"
    # Few tokens: all rows of the tables would be read for nothing.
    assert cheapest_backend(1, 4096, 102_400, 1024, 2) == "gather"
    assert cheapest_backend(8192, 64, 2**20, 2048, 2) == "gather"
    assert hot_threshold(4096) == 4096 * 19 // 1000
    assert hot_threshold(1) == 1


def test_products_need_one_16_bit_dtype(device: torch.device) -> None:
    for backend in ("hot_cold", "dense"):
        with pytest.raises(ValueError, match=r"one dtype, float16 or bfloat16.*got float32"):
            triton_flash_expert_func(
                *make_case(3, 8, 9, 2, torch.float32, device).args(), backend=backend
            )


def test_interpreter_has_no_bfloat16_products(device: torch.device) -> None:
    case = make_case(3, 8, 9, 2, torch.bfloat16, device)
    if device.type == "cuda":
        results(case, "hot_cold")
        return
    with pytest.raises(ValueError, match="'hot_cold' takes float16, not bfloat16, under Triton's"):
        results(case, "hot_cold")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["hot_cold", "dense", "gather"])
@pytest.mark.parametrize("routing", ["zipf", "product_keys", "one_expert", "uniform"])
def test_at_size(backend: str, routing: str, dtype: torch.dtype, device: torch.device) -> None:
    """Sizes take several blocks of tokens, experts and hidden size, the last one not full."""
    from flash_moe.bench.cases import Case as BenchCase
    from flash_moe.bench.cases import make_inputs
    from flash_moe.bench.measure import exact_results, relative_error

    name = str(dtype).removeprefix("torch.")
    bias = 2.0 if routing == "product_keys" else 0.0
    inputs = make_inputs(
        BenchCase("test", 1000, 1000, 2500, 300, dtype=name, routing=routing, key_bias=bias),
        device,
    )
    out = inputs.call(lambda *args: triton_flash_expert_func(*args, backend=backend))
    computed = (out, *torch.autograd.grad(out, inputs.leaves, inputs.grad, retain_graph=True))
    largest = 2**-8 if dtype == torch.bfloat16 else 2**-11
    for what, one, exact in zip(RESULTS, computed, exact_results(inputs), strict=True):
        assert relative_error(one, exact) < largest, what
    for _ in range(50 if routing == "zipf" else 3):
        again = inputs.call(lambda *args: triton_flash_expert_func(*args, backend=backend))
        grads = torch.autograd.grad(again, inputs.leaves, inputs.grad)
        for what, one, other in zip(RESULTS, computed, (again, *grads), strict=True):
            assert torch.equal(one, other), what

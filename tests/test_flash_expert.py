"""The expert op against float64 autograd, in every backend."""

from typing import Any

import pytest
import torch
from cases import INTERPRETED_TOLERANCES, RESULTS, TOLERANCES, Case, assert_close, make_case, oracle
from torch import Tensor

from flash_moe import ragged_flash_expert_func, triton_flash_expert_func
from flash_moe.ops import indices

BACKENDS = ("reference", "torch_sparse", "gather")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# T, H, E, K, and what breaks there and nowhere else.
SHAPES = {
    "odd sizes, no power of two anywhere": (13, 7, 57, 5),
    "one of everything": (1, 1, 1, 1),
    "a hidden size with a ragged end in its last block": (5, 1000, 33, 9),
    "a hidden size under a warp": (6, 7, 20, 3),
    "a hidden size of 3 * 32": (6, 96, 20, 3),
    "a hidden size of one block": (3, 1024, 20, 3),
    "a hidden size of several blocks with a ragged end": (3, 2880, 20, 3),
    "a hidden size of many blocks": (2, 7168, 9, 3),
    "more pairs in a token than a program takes": (3, 16, 301, 150),
    "more slots than experts: duplicates in every token": (17, 8, 3, 12),
    "no tokens": (0, 8, 5, 3),
    "no slots": (4, 8, 5, 0),
    "no features": (3, 0, 5, 2),
}


def place(backend: str, device: torch.device) -> torch.device:
    return device if backend == "gather" else torch.device("cpu")


def run(case: Case, backend: str | None) -> tuple[Tensor, ...]:
    out = triton_flash_expert_func(*case.args(), backend=backend)
    return out.detach(), *torch.autograd.grad(out, case.differentiable(), case.grad)


def check(case: Case, backend: str, tolerance: float) -> None:
    for name, result, expected in zip(RESULTS, run(case, backend), oracle(case), strict=True):
        assert_close(result, expected, tolerance, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_match_float64(
    backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = make_case(29, 96, 61, 11, dtype, place(backend, device))
    results = run(case, backend)
    for name, result, expected in zip(RESULTS, results, oracle(case), strict=True):
        assert result.dtype == dtype, name
        assert_close(result, expected, TOLERANCES[dtype], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(backend: str, shape: tuple[int, int, int, int], device: torch.device) -> None:
    check(make_case(*shape, device=place(backend, device)), backend, TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_empty_slots_contribute_nothing_and_get_zero_gradient(
    backend: str, index_dtype: torch.dtype, device: torch.device
) -> None:
    indices = torch.randint(-1, 9, (12, 6), generator=torch.Generator().manual_seed(3))
    indices[4] = -1
    where = place(backend, device)
    case = make_case(12, 20, 9, 6, device=where, indices=indices.to(index_dtype))
    # Row 0 is what an empty slot would read if it were taken for a row.
    case.indices[case.indices == 0] = 1
    with torch.no_grad():
        case.down_weights[0], case.up_weights[0] = float("nan"), float("nan")
        case.routing_weights[case.indices < 0] = float("nan")
    out, _, down_grad, _, weights_grad = run(case, backend)
    assert out[4].count_nonzero() == 0
    assert down_grad[0].count_nonzero() == 0
    assert weights_grad[case.indices < 0].count_nonzero() == 0
    with torch.no_grad():
        case.down_weights[0], case.up_weights[0] = 0.0, 0.0
        case.routing_weights[case.indices < 0] = 0.0
    check(case, backend, TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_expert(backend: str, device: torch.device) -> None:
    indices = torch.full((70, 3), 2)
    case = make_case(70, 24, 40, 3, device=place(backend, device), indices=indices)
    check(case, backend, TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_broadcast_arguments(backend: str, device: torch.device) -> None:
    where = place(backend, device)
    plain = make_case(10, 12, 30, 4, device=where)
    strided = Case(
        plain.hidden_states.detach().t().contiguous().t().requires_grad_(),
        plain.down_weights.detach().repeat(1, 2)[:, :12].requires_grad_(),
        plain.up_weights.detach().t().contiguous().t().requires_grad_(),
        plain.indices.t().contiguous().t(),
        torch.ones(1, 1, device=where).expand(10, 4).detach().requires_grad_(),
        plain.grad[:1].expand(10, 12),
    )
    assert not any(tensor.is_contiguous() for tensor in strided.args())
    check(strided, backend, TOLERANCES[torch.float32])


MIXED_DTYPES = [
    (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16),
    (torch.float64, torch.bfloat16, torch.float16, torch.float32),
    (torch.bfloat16, torch.float64, torch.float32, torch.float16),
    (torch.float16, torch.float32, torch.float64, torch.float64),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=str)
def test_arguments_of_different_dtypes(
    backend: str, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    case = make_case(16, 32, 20, 5, torch.float64, place(backend, device))
    names = ("hidden_states", "down_weights", "up_weights", "routing_weights")
    for name, dtype in zip(names, dtypes, strict=True):
        setattr(case, name, getattr(case, name).detach().to(dtype).requires_grad_())
    case.grad = case.grad.to(dtypes[0])
    results = run(case, backend)
    assert [result.dtype for result in results] == [dtypes[0], *dtypes]
    interpreted = backend == "gather" and not case.grad.is_cuda
    tolerances = INTERPRETED_TOLERANCES if interpreted else TOLERANCES
    for name, result, expected in zip(RESULTS, results, oracle(case), strict=True):
        # Some sums on the way to a float64 result are of narrower arguments, in float32.
        tolerance = max(tolerances[result.dtype], TOLERANCES[torch.float32])
        assert_close(result, expected, tolerance, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_for_what_requires_them(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_moe.ops.backends import load_backend

    case = make_case(8, 16, 20, 3, device=place(backend, device))
    expected = dict(zip(RESULTS, oracle(case), strict=True))
    frozen = [case.down_weights, case.up_weights]
    for table in frozen:
        table.requires_grad_(False)

    def unwanted(*_: object) -> Tensor:
        raise AssertionError("gradient of a frozen table was computed")

    monkeypatch.setattr(load_backend(backend), "spmm_t", unwanted)
    out = triton_flash_expert_func(*case.args(), backend=backend)
    wanted = (case.hidden_states, case.routing_weights)
    for name, grad in zip(
        ("hidden_states", "routing_weights"),
        torch.autograd.grad(out, wanted, case.grad),
        strict=True,
    ):
        assert_close(grad, expected[name], TOLERANCES[torch.float32], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skewed", [False, True])
def test_repeats_are_bitwise_equal(backend: str, skewed: bool, device: torch.device) -> None:
    where = place(backend, device)
    interpreted = backend == "gather" and where.type == "cpu"
    shape = (5, 32, 9, 4) if interpreted else (90, 32, 50, 10)
    indices = torch.randint(shape[2], shape[::3], generator=torch.Generator().manual_seed(1))
    if skewed:
        indices = indices**2 // shape[2]
    case = make_case(*shape, torch.bfloat16, where, indices=indices)
    first = run(case, backend)
    for _ in range(50):
        for name, once, again in zip(RESULTS, first, run(case, backend), strict=True):
            assert torch.equal(once, again), name


def test_reference_in_many_blocks() -> None:
    from flash_moe.ops.backends import reference

    with reference.tuning(block_elements=64):
        check(make_case(9, 16, 12, 5), "reference", TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_rounded_once(backend: str, device: torch.device) -> None:
    """The error is that of one rounding, 1.66e-3 for bfloat16; of two it is 2.3e-3."""
    where = place(backend, device)
    if backend == "gather" and where.type == "cpu":
        pytest.skip("needs a CUDA device: Triton's interpreter cuts bfloat16 off, a GPU rounds")
    case = make_case(200, 64, 50, 8, torch.bfloat16, where)
    leaves = case.differentiable()
    offsets = torch.arange(201, device=where) * 8
    arguments = (*case.args()[:3], offsets, case.indices.flatten(), leaves[3].flatten())
    out = ragged_flash_expert_func(*arguments, weight_grad_scale=1 / 3, backend=backend)
    results = (out, *torch.autograd.grad(out, leaves, case.grad))
    expected = list(oracle(case))
    expected[2], expected[3] = expected[2] / 3, expected[3] / 3
    for name, result, one in zip(RESULTS, results, expected, strict=True):
        assert_close(result, one, 1.8e-3, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_rows(backend: str, device: torch.device) -> None:
    where = place(backend, device)
    # One row so long that its program walks it in strides; no rows at either end.
    lengths = torch.tensor([0, 300, 1, 0, 3, 5, 0, 0])
    case = make_case(8, 16, 25, 300, device=where)
    slots = torch.arange(300) < lengths.unsqueeze(1)
    case.indices[~slots.to(where)] = -1
    out, *grads = oracle(case)
    leaves = [tensor.detach().requires_grad_() for tensor in case.differentiable()]
    hidden_states, down_weights, up_weights, routing_weights = leaves
    kept = slots.to(where)
    result = ragged_flash_expert_func(
        hidden_states,
        down_weights,
        up_weights,
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(where),
        case.indices[kept],
        routing_weights[kept],
        weight_grad_scale=0.25,
        backend=backend,
    )
    result_grads = torch.autograd.grad(result, leaves, case.grad)
    scaled = [grads[0], grads[1] * 0.25, grads[2] * 0.25, grads[3]]
    results, expected = (result, *result_grads), (out, *scaled)
    for name, one, other in zip(RESULTS, results, expected, strict=True):
        assert_close(one, other, TOLERANCES[torch.float32], name)


@pytest.mark.parametrize("backend", ["reference", "torch_sparse"])
def test_gradcheck(backend: str) -> None:
    case = make_case(3, 4, 5, 2, torch.float64)

    def func(x: Tensor, down: Tensor, up: Tensor, weights: Tensor) -> Tensor:
        return triton_flash_expert_func(x, down, up, case.indices, weights, backend=backend)

    assert torch.autograd.gradcheck(func, case.differentiable())


def test_default_backend_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_moe.ops.backend_choice import default_backend

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("FLASH_MOE_BACKEND", raising=False)
    assert default_backend(torch.device("cuda")) == "gather"
    assert default_backend(torch.device("cpu")) == "torch_sparse"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert default_backend(torch.device("cpu")) == "gather"
    monkeypatch.setenv("FLASH_MOE_BACKEND", "reference")
    assert default_backend(torch.device("cpu")) == "reference"


def replaced(**changes: object) -> dict[str, object]:
    case = make_case(4, 8, 6, 3)
    names = ("hidden_states", "down_weights", "up_weights", "indices", "routing_weights")
    return dict(zip(names, case.args(), strict=True)) | changes


BAD_INPUTS = {
    "hidden_states is 3-d": (
        replaced(hidden_states=torch.zeros(1, 4, 8)),
        ValueError,
        r"hidden_states must have shape \(num_tokens, hidden_size\), got \(1, 4, 8\)",
    ),
    "down_weights of another hidden size": (
        replaced(down_weights=torch.zeros(6, 9)),
        ValueError,
        r"down_weights must have rows of hidden_size = 8 .* got shape \(6, 9\)",
    ),
    "up_weights of another shape": (
        replaced(up_weights=torch.zeros(5, 8)),
        ValueError,
        r"up_weights must have the shape of down_weights, \(6, 8\), got \(5, 8\)",
    ),
    "indices of other tokens": (
        replaced(indices=torch.zeros(3, 3, dtype=torch.int64)),
        ValueError,
        r"indices must have one row for each of the 4 rows .* got shape \(3, 3\)",
    ),
    "indices is 1-d": (
        replaced(indices=torch.zeros(4, dtype=torch.int64)),
        ValueError,
        r"indices must have shape \(num_tokens, num_experts_per_tok\), got \(4,\)",
    ),
    "routing_weights of another shape": (
        replaced(routing_weights=torch.zeros(4, 2)),
        ValueError,
        r"routing_weights must have the shape of indices, \(4, 3\), got \(4, 2\)",
    ),
    "indices are floats": (
        replaced(indices=torch.zeros(4, 3)),
        TypeError,
        "indices must have one of the dtypes int32, int64, got torch.float32",
    ),
    "hidden_states are integers": (
        replaced(hidden_states=torch.zeros(4, 8, dtype=torch.int64)),
        TypeError,
        "hidden_states must have one of the dtypes float16, .* got torch.int64",
    ),
    "routing_weights is a list": (
        replaced(routing_weights=[[1.0]]),
        TypeError,
        "routing_weights must be a torch.Tensor, got list",
    ),
    "up_weights on another device": (
        replaced(up_weights=torch.zeros(6, 8, device="meta")),
        ValueError,
        "up_weights must be on cpu, where hidden_states is, got meta",
    ),
    "hidden_states is 1-d": (
        replaced(hidden_states=torch.zeros(8)),
        ValueError,
        r"hidden_states must have shape \(num_tokens, hidden_size\), got \(8,\)",
    ),
    "down_weights is 3-d": (
        replaced(down_weights=torch.zeros(6, 8, 1)),
        ValueError,
        r"down_weights must have shape \(num_experts, hidden_size\), got \(6, 8, 1\)",
    ),
    "down_weights are complex": (
        replaced(down_weights=torch.zeros(6, 8, dtype=torch.complex64)),
        TypeError,
        "down_weights must have one of the dtypes float16, .* got torch.complex64",
    ),
    "up_weights are 8-bit": (
        replaced(up_weights=torch.zeros(6, 8, dtype=torch.float8_e4m3fn)),
        TypeError,
        "up_weights must have one of the dtypes float16, .* got torch.float8_e4m3fn",
    ),
    "routing_weights are integers": (
        replaced(routing_weights=torch.ones(4, 3, dtype=torch.int32)),
        TypeError,
        "routing_weights must have one of the dtypes float16, .* got torch.int32",
    ),
    "indices are 16-bit": (
        replaced(indices=torch.zeros(4, 3, dtype=torch.int16)),
        TypeError,
        "indices must have one of the dtypes int32, int64, got torch.int16",
    ),
    "indices on another device": (
        replaced(indices=torch.zeros(4, 3, dtype=torch.int64, device="meta")),
        ValueError,
        "indices must be on cpu, where hidden_states is, got meta",
    ),
    "hidden_states are sparse": (
        replaced(hidden_states=torch.zeros(4, 8).to_sparse()),
        TypeError,
        "hidden_states must be a dense tensor, got layout torch.sparse_coo",
    ),
    "hidden_states are nested": (
        replaced(
            hidden_states=torch.nested.nested_tensor([torch.zeros(4, 8)], layout=torch.jagged)
        ),
        TypeError,
        "hidden_states must be a dense tensor, got a nested tensor",
    ),
    "index too large": (
        replaced(indices=torch.full((4, 3), 6)),
        ValueError,
        r"indices must lie in \[-1, 6\).* ids from 6 to 6 were found",
    ),
    "index too small": (
        replaced(indices=torch.full((4, 3), -2)),
        ValueError,
        r"indices must lie in \[-1, 6\).* ids from -2 to -2 were found",
    ),
    "index that is valid in its low 32 bits": (
        replaced(indices=torch.full((4, 3), 2**32 + 1)),
        ValueError,
        r"ids from 4294967297 to 4294967297 were found",
    ),
    "unknown backend": (
        replaced(backend="cublas"),
        ValueError,
        r"backend \(or FLASH_MOE_BACKEND\) must be one of reference, torch_sparse, gather, "
        "hot_cold, dense, got 'cublas'",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(arguments: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        triton_flash_expert_func(**arguments)  # type: ignore[arg-type]


BAD_OFFSETS = {
    "first is not 0": [1, 2, 4],
    "last is not the number of pairs": [0, 2, 3],
    "past the end": [0, 9, 4],
    "falling": [0, 3, 2, 4],
    "negative": [0, -1, 4],
}


@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_row_offsets(
    backend: str, offsets: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_MOE_STRICT_INDICES", "1")
    where = place(backend, device)
    case = make_case(len(offsets) - 1, 8, 6, 1, device=where)
    with pytest.raises(ValueError, match=r"row_offsets must ascend from 0 to .* = 4, but"):
        ragged_flash_expert_func(
            *case.args()[:3],
            torch.tensor(offsets, device=where),
            torch.zeros(4, dtype=torch.int64, device=where),
            torch.ones(4, device=where),
            backend=backend,
        )
    # What was found is forgotten with the error.
    check(case, backend, TOLERANCES[torch.float32])


def test_bad_offsets_and_ids_are_made_harmless(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels read the corrected values until the error is reported, which is late on CUDA."""

    offsets = torch.tensor([-3, 9, 2, 4], device=device)
    ids = torch.tensor([5, 6, -2, -1], device=device)
    with monkeypatch.context() as patch:
        patch.setattr(indices.IndexErrorRecord, "poll", lambda record: None)
        checked_offsets, checked_ids = indices.check_ragged(offsets, ids, 6, in_kernels=True)
    assert checked_offsets.tolist() == [0, 4, 2, 4]
    assert checked_ids.tolist() == [5, -1, -1, -1]
    with pytest.raises(ValueError, match="row_offsets must ascend"):
        indices.raise_index_errors()


BAD_RAGGED = {
    "row_offsets of other tokens": (
        {"row_offsets": torch.tensor([0, 4])},
        ValueError,
        r"row_offsets must have shape \(num_tokens \+ 1,\) = \(3,\), got \(2,\)",
    ),
    "row_offsets are floats": (
        {"row_offsets": torch.tensor([0.0, 2.0, 4.0])},
        TypeError,
        "row_offsets must have one of the dtypes int32, int64, got torch.float32",
    ),
    "pairs without tokens": (
        {"hidden_states": torch.zeros(0, 8), "row_offsets": torch.tensor([0])},
        ValueError,
        "expert_ids must be empty without tokens, got 4 ids",
    ),
    "routing_weights of another length": (
        {"routing_weights": torch.ones(5)},
        ValueError,
        r"routing_weights must have the shape of expert_ids, \(4,\), got \(5,\)",
    ),
    "expert_ids is 2-d": (
        {"expert_ids": torch.zeros(2, 2, dtype=torch.int64)},
        ValueError,
        r"expert_ids must have shape \(num_pairs,\), got \(2, 2\)",
    ),
    "more experts than ids can count": (
        {
            "down_weights": torch.zeros(1, 1).expand(2**31, 8),
            "up_weights": torch.zeros(1, 1).expand(2**31, 8),
        },
        ValueError,
        "down_weights must have at most 2147483647 rows, got 2147483648",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_RAGGED.values(), ids=BAD_RAGGED)
def test_bad_ragged_input(changes: dict[str, Tensor], kind: type[Exception], message: str) -> None:
    case = make_case(2, 8, 6, 2)
    names = ("hidden_states", "down_weights", "up_weights")
    arguments: dict[str, Any] = dict(zip(names, case.args()[:3], strict=True))
    arguments |= {"row_offsets": torch.tensor([0, 2, 4]), "expert_ids": torch.tensor([0, 1, 2, 3])}
    arguments |= {"routing_weights": torch.ones(4)} | changes
    with pytest.raises(kind, match=message):
        ragged_flash_expert_func(**arguments)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("sort_limit", [1, 4096])
def test_ids_out_of_range_in_kernels(
    index_dtype: torch.dtype,
    sort_limit: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASH_MOE_STRICT_INDICES", "1")
    case = make_case(9, 8, 6, 3, device=device)
    with indices.tuning(max_sorted_slots=sort_limit):
        check(case, "gather", TOLERANCES[torch.float32])
        case.indices = case.indices.to(index_dtype)
        for least, greatest in ((-2, -2), (6, 6), (-9, 2**31 - 1)):
            bad = case.indices.clone()
            bad[2, 1], bad[7, 0] = greatest, least
            arguments = (*case.args()[:3], bad, case.routing_weights)
            message = rf"\[-1, 6\).* ids from {least} to {greatest} were found"
            with pytest.raises(ValueError, match=message):
                triton_flash_expert_func(*arguments, backend="gather")


@pytest.mark.parametrize("num_experts", [50, 2**31 - 1])
def test_slots_are_sorted_stably(num_experts: int, device: torch.device) -> None:
    from flash_moe.ops.indices import check_and_sort

    draw = torch.Generator().manual_seed(0)
    indices_TK = torch.randint(-1, 50, (7, 33), generator=draw)
    indices_TK[3, 5] = num_experts - 1
    ids, order = check_and_sort(indices_TK.to(device), num_experts, in_kernels=True)
    assert order is not None
    expected, slots = indices_TK.sort(dim=1, stable=True)
    assert torch.equal(ids.cpu().view(7, 33).long(), expected)
    assert torch.equal(order.cpu().view(7, 33) - 33 * torch.arange(7).unsqueeze(1), slots)


@pytest.mark.gpu
def test_index_out_of_range_on_cuda_is_reported_and_the_context_survives(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_moe.ops.indices import raise_index_errors

    good = make_case(64, 32, 50, 8, device=device)
    bad = make_case(64, 32, 50, 8, device=device)
    bad.indices[3, 4], bad.indices[9, 0] = 2**32 + 7, -5
    message = r"\[-1, 50\).* ids from -5 to 4294967303 were found"
    triton_flash_expert_func(*bad.args())
    with pytest.raises(ValueError, match=message):
        raise_index_errors()
    out = triton_flash_expert_func(*bad.args())
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=message):
        out.sum().backward()
    triton_flash_expert_func(*bad.args())
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=message):
        triton_flash_expert_func(*good.args())
    monkeypatch.setenv("FLASH_MOE_STRICT_INDICES", "1")
    with pytest.raises(ValueError, match=message):
        triton_flash_expert_func(*bad.args())
    check(good, "gather", TOLERANCES[torch.float32])


@pytest.mark.gpu
def test_no_host_sync(device: torch.device) -> None:
    case = make_case(256, 64, 500, 16, torch.bfloat16, device)
    run(case, "gather")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, "gather")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden_size", [64, 1000, 2880, 7168])
def test_large_shapes_on_cuda(dtype: torch.dtype, hidden_size: int, device: torch.device) -> None:
    check(make_case(128, hidden_size, 3000, 70, dtype, device), "gather", TOLERANCES[dtype])

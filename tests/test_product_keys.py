"""The best sums of two keys' scores, against all sums."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_moe.ops import product_keys, product_keys_cpu
from flash_moe.ops.product_keys import ChosenKeys, candidate_ranks, product_key_topk

# T, A, B, K
SHAPES = [(5, 9, 9, 20), (4, 6, 6, 36), (7, 3, 40, 30), (3, 1, 13, 1), (0, 4, 4, 2)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One Triton kernel, three, NumPy, operations of PyTorch.
WAYS = ("fused", "kernels", "torch_sparse", "reference")


class Problem:
    """Scores of both axes and biases; with `ties`, sums that are equal exactly."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        ties: bool = False,
        biased: bool = False,
    ) -> None:
        tokens, first, second, self.k = shape
        draw = torch.Generator().manual_seed(sum(shape))

        def drawn(*sizes: int) -> Tensor:
            values = torch.randn(sizes, generator=draw)
            return (values.round() if ties else values).to(device)

        self.scores = [drawn(tokens, size).to(dtype).requires_grad_() for size in (first, second)]
        self.biases = [drawn(size) if biased else None for size in (first, second)]

    def chosen(self) -> ChosenKeys:
        (first, second), (first_bias, second_bias) = self.scores, self.biases
        return product_key_topk(
            first, second, self.k, first_bias=first_bias, second_bias=second_bias
        )

    def expected(self) -> ChosenKeys:
        """By sorting all sums; the sort is stable, so of equal ones the lowest index is first."""
        wide = torch.promote_types(self.scores[0].dtype, torch.float32)
        first, second = (scores.to(wide) for scores in self.scores)
        compared = [
            scores.detach() if bias is None else scores.detach() + bias
            for scores, bias in zip((first, second), self.biases, strict=True)
        ]
        sums = (compared[0].unsqueeze(2) + compared[1].unsqueeze(1)).flatten(1)
        indices = sums.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        i, j = indices // second.shape[1], indices % second.shape[1]
        return ChosenKeys(indices, first.gather(1, i) + second.gather(1, j))


@pytest.fixture(params=WAYS)
def place(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> torch.device:
    """Device of the tensors for each way to choose."""
    if request.param == "kernels":
        monkeypatch.setattr(product_keys, "MAX_FUSED", 0)
    if request.param in ("fused", "kernels"):
        return device
    monkeypatch.setenv("FLASH_MOE_BACKEND", request.param)
    return torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_best_of_all_sums(
    shape: tuple[int, int, int, int], dtype: torch.dtype, place: torch.device
) -> None:
    for ties, biased in ((False, True), (True, False)):
        problem = Problem(shape, dtype, place, ties, biased)
        found, expected = problem.chosen(), problem.expected()
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.scores, expected.scores)
        grad = torch.randn_like(found.scores)
        grads = torch.autograd.grad(found.scores, problem.scores, grad)
        exact = Problem(shape, torch.float64, place, ties, biased)
        exact.scores = [one.detach().double().requires_grad_() for one in problem.scores]
        sums = exact.expected().scores
        for one, other in zip(
            grads, torch.autograd.grad(sums, exact.scores, grad.double()), strict=True
        ):
            assert one.dtype == dtype
            # Rounded once.
            torch.testing.assert_close(one, other.to(dtype))


def test_zeros_of_both_signs_are_equal(place: torch.device) -> None:
    first = torch.tensor([[-0.0, 0.0, -0.0]], device=place)
    second = torch.tensor([[0.0, -0.0]], device=place)
    indices, _ = product_key_topk(first, second, 6)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_scores_without_a_number(place: torch.device) -> None:
    """Keys that are masked come last; what is no number gives indices in range, all different."""
    first = torch.tensor([[1.0, -torch.inf, 2.0, torch.nan]], device=place)
    second = torch.tensor([[torch.inf, 0.0, -1.0]], device=place)
    assert product_key_topk(first[:, :3], second[:, 1:], 3).indices.tolist() == [[4, 0, 5]]
    indices, _ = product_key_topk(first, second, 12)
    assert sorted(indices.tolist()[0]) == list(range(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_indices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", "torch_sparse")
    side = 46340
    scores = torch.arange(side, dtype=dtype).unsqueeze(0)
    indices, _ = product_key_topk(scores, scores, 3)
    last = side**2 - 1
    assert indices.tolist() == [[last, last - side, last - 1]]


def test_rows_that_are_not_contiguous(place: torch.device) -> None:
    scores = torch.randn(4, 17, device=place)
    expected = product_key_topk(scores[:, :9].contiguous(), scores[:, 9:].contiguous(), 12)
    for both in (scores, scores.t().contiguous().t()):
        found = product_key_topk(both[:, :9], both[:, 9:], 12)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.scores, expected.scores)


def test_bitwise_repeatable(place: torch.device) -> None:
    problem = Problem((6, 11, 7, 40), torch.float32, place)
    grad = torch.randn(6, 40, device=place)
    results = []
    for _ in range(3):
        found = problem.chosen()
        grads = torch.autograd.grad(found.scores, problem.scores, grad)
        results.append((*found, *grads))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("way", "module", "name"),
    [
        ("torch_sparse", product_keys_cpu, "CHUNK_NUMBERS"),
        ("reference", product_keys, "MAX_CANDIDATES_HELD"),
    ],
)
def test_tokens_in_chunks(
    way: str, module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", way)
    problem = Problem((7, 9, 9, 20), torch.float32, torch.device("cpu"), biased=True)
    expected = problem.chosen()
    monkeypatch.setattr(module, name, 150)
    assert all(map(torch.equal, problem.chosen(), expected))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(map(torch.equal, problem.chosen(), expected))


def test_biases_of_another_dtype(place: torch.device) -> None:
    problem = Problem((4, 8, 6, 9), torch.bfloat16, place, ties=True, biased=True)
    expected = problem.chosen()
    for dtype in (torch.float16, torch.float64):
        problem.biases = [None if bias is None else bias.to(dtype) for bias in problem.biases]
        assert all(map(torch.equal, problem.chosen(), expected))


def test_candidates_are_k_log_k() -> None:
    assert candidate_ranks(3, 9, 9) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert candidate_ranks(3, 2, 2) == [(0, 0), (0, 1), (1, 0)]
    assert len(candidate_ranks(512, 512, 512)) == sum(512 // (i + 1) for i in range(512))


@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(biased: bool, place: torch.device) -> None:
    problem = Problem((4, 5, 6, 7), torch.float32, place, biased=biased)
    arguments = (*problem.scores, problem.k, *problem.biases)
    ops = torch.ops.flash_moe
    torch.library.opcheck(ops.product_key_topk.default, arguments)
    found = problem.chosen()
    grad = torch.randn_like(found.scores)
    torch.library.opcheck(
        ops.product_key_topk_backward.default, (grad, found.indices, 5, 6, torch.float32)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(dynamic: bool, place: torch.device) -> None:
    def weights(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        chosen = product_key_topk(first, second, 6)
        return chosen.indices, chosen.scores.softmax(-1)

    torch._dynamo.reset()
    compiler = "inductor" if place.type == "cuda" else "aot_eager"
    compiled = torch.compile(weights, fullgraph=True, dynamic=dynamic, backend=compiler)
    for tokens in (3, 8):
        problem = Problem((tokens, 5, 7, 6), torch.float32, place)
        results = []
        for func in (compiled, weights):
            indices, found = func(*problem.scores)
            grads = torch.autograd.grad(found, problem.scores, torch.ones_like(found).cumsum(1))
            results.append((indices, found, *grads))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


class Names(TorchDispatchMode):
    """Remembers which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_intercepts_operations_sees_the_ops(place: torch.device) -> None:
    problem = Problem((3, 5, 6, 7), torch.float32, place)
    expected = problem.chosen()
    expected_grads = torch.autograd.grad(expected.scores.sum(), problem.scores)
    with Names() as seen:
        found = problem.chosen()
        grads = torch.autograd.grad(found.scores.sum(), problem.scores)
    assert all(map(torch.equal, (*found, *grads), (*expected, *expected_grads)))
    ops = [name for name in seen.names if "product_key" in name]
    assert ops == [
        "flash_moe.product_key_topk.default",
        "flash_moe.product_key_topk_backward.default",
    ]
    with FakeTensorMode() as fake:
        first, second = (fake.from_tensor(scores) for scores in problem.scores)
        assert product_key_topk(first, second, 7).scores.shape == (3, 7)
    assert product_key_topk(first, second, 7).indices.shape == (3, 7)


def test_no_second_derivative() -> None:
    problem = Problem((2, 3, 3, 2), torch.float32, torch.device("cpu"))
    grad = torch.ones(2, 2, requires_grad=True)
    first, _ = torch.autograd.grad(problem.chosen().scores, problem.scores, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="product_key_topk has no second derivative"):
        first.sum().backward()


GOOD: dict[str, Any] = {
    "first_scores": torch.zeros(2, 3),
    "second_scores": torch.zeros(2, 4),
    "k": 5,
    "first_bias": torch.zeros(3),
    "second_bias": torch.zeros(4),
}
WRONG = [
    ("first_scores", [[0.0]], TypeError, "first_scores must be a torch.Tensor, got list"),
    ("first_scores", torch.zeros(2, 3).long(), TypeError, "first_scores must have one of the"),
    ("first_scores", torch.zeros(3), ValueError, r"first_scores must have shape \(num_tokens, "),
    ("second_scores", torch.zeros(2, 4).half(), TypeError, "second_scores must have the dtype of"),
    ("second_scores", torch.zeros(3, 4), ValueError, "second_scores must have one row for each of"),
    ("second_scores", torch.zeros(2, 4, device="meta"), ValueError, "second_scores must be on cpu"),
    ("first_bias", torch.zeros(4), ValueError, r"first_bias must have shape \(3,\), one number"),
    ("second_bias", torch.zeros(4).int(), TypeError, "second_bias must have one of the dtypes"),
    ("k", 0, ValueError, "k must be at least 1, got 0"),
    ("k", 13, ValueError, "k must be at most the number of sums, 12, got 13"),
    ("k", 2.0, TypeError, "k must be an int, got 2.0"),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), WRONG)
def test_wrong_arguments(name: str, value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        product_key_topk(**GOOD | {name: value})


def test_backend_that_does_not_take_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", "gather")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend 'gather' takes CUDA tensors"):
        product_key_topk(torch.zeros(2, 3), torch.zeros(2, 4), 5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        (64, 500, 500, 64),
        (64, 500, 500, 512),
        (16, 4096, 4096, 64),
        (4, 4096, 4096, 4096),
        (8, 100, 4000, 1000),
        (1000, 16, 16, 4),
    ],
)
def test_large_shapes_on_a_gpu(shape: tuple[int, int, int, int], device: torch.device) -> None:
    for dtype, ties in ((torch.float32, False), (torch.bfloat16, True)):
        on_gpu = Problem(shape, dtype, device, ties)
        on_cpu = Problem(shape, dtype, torch.device("cpu"), ties)
        found, expected = on_gpu.chosen(), on_cpu.chosen()
        assert torch.equal(found.indices.cpu(), expected.indices)
        assert torch.equal(found.scores.cpu(), expected.scores)
        grad = torch.randn(expected.scores.shape)
        for one, other in zip(
            torch.autograd.grad(found.scores, on_gpu.scores, grad.to(device)),
            torch.autograd.grad(expected.scores, on_cpu.scores, grad),
            strict=True,
        ):
            torch.testing.assert_close(one.cpu(), other)


@pytest.mark.gpu
def test_in_a_cuda_graph(device: torch.device) -> None:
    problem = Problem((50, 40, 30, 20), torch.float32, device)
    scores = [one.detach().clone().requires_grad_() for one in problem.scores]
    grad = torch.randn(50, 20, device=device)

    def step() -> tuple[Tensor, ...]:
        chosen = product_key_topk(scores[0], scores[1], problem.k)
        return (*chosen, *torch.autograd.grad(chosen.scores, scores, grad))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for one in scores:
                one.copy_(torch.randn_like(one))
        graph.replay()
        for one, other in zip(captured, step(), strict=True):
            assert torch.equal(one, other)

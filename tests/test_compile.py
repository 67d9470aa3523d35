"""torch.library registration, torch.compile, CUDA graphs."""

import pytest
import torch
from cases import RESULTS, Case, make_case
from torch import Tensor

from flash_moe import ragged_flash_expert_func, triton_flash_expert_func
from flash_moe.ops.backend_choice import MIN_PAIRS_FOR_SIDE_STREAM, TRITON_BACKENDS

BACKENDS = ("reference", "torch_sparse", "gather")
PRODUCT_BACKENDS = ("hot_cold", "dense")


def place(backend: str, device: torch.device) -> torch.device:
    return device if backend in TRITON_BACKENDS else torch.device("cpu")


def results(func: object, case: Case) -> list[Tensor]:
    assert callable(func)
    out = func(*case.args())
    return [out, *torch.autograd.grad(out, case.differentiable(), case.grad)]


@pytest.mark.parametrize(
    ("backend", "ragged"),
    [(backend, False) for backend in (*BACKENDS, *PRODUCT_BACKENDS)]
    + [(backend, True) for backend in BACKENDS],
)
def test_opcheck(backend: str, ragged: bool, device: torch.device) -> None:
    dtype = torch.float16 if backend in PRODUCT_BACKENDS else torch.float32
    case = make_case(4, 8, 9, 3, dtype, device=place(backend, device))
    ids, weights, offsets = case.indices, case.routing_weights, None
    if ragged:
        ids, weights = ids.flatten(), weights.detach().flatten().requires_grad_()
        offsets = torch.arange(5, device=ids.device) * 3
    tensors = (case.hidden_states, case.down_weights, case.up_weights, ids, offsets, weights)
    ops = torch.ops.flash_moe
    torch.library.opcheck(ops.expert_forward.default, (*tensors, 0.5, backend))
    hidden, down, up, weights = (tensor.detach() for tensor in (*tensors[:3], weights))
    _, *saved = ops.expert_forward(hidden, down, up, ids, offsets, weights, 0.5, backend)
    top_k = None if ragged else 3
    for needs_grad in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(
            ops.expert_backward.default,
            (case.grad, hidden, down, up, weights, *saved, top_k, needs_grad, 0.5, backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(backend: str, dynamic: bool, device: torch.device) -> None:
    def op(*args: Tensor) -> Tensor:
        return triton_flash_expert_func(*args, backend=backend) * 2

    torch._dynamo.reset()
    on_gpu = place(backend, device).type == "cuda"
    compiler = "inductor" if on_gpu else "aot_eager"
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=compiler)
    for num_tokens in (5, 8, 3):
        case = make_case(num_tokens, 8, 9, 3, device=place(backend, device))
        for name, one, other in zip(
            RESULTS, results(compiled, case), results(op, case), strict=True
        ):
            assert torch.equal(one, other), name


def test_fullgraph_with_the_default_backend_and_ragged_rows() -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    case = make_case(3, 8, 9, 1)
    ids, weights = torch.tensor([1, 0, 8, 8, -1]), torch.rand(5)

    def op(hidden_states: Tensor) -> Tensor:
        return ragged_flash_expert_func(
            hidden_states, case.down_weights, case.up_weights, offsets, ids, weights
        )

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.hidden_states), op(case.hidden_states))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", TRITON_BACKENDS)
def test_cuda_graph_replays_with_new_values(backend: str, device: torch.device) -> None:
    def op(*args: Tensor) -> Tensor:
        return triton_flash_expert_func(*args, backend=backend)

    # Pairs enough to be sorted by expert on a second stream.
    shape = (1024, 64, 500, MIN_PAIRS_FOR_SIDE_STREAM // 1024)
    static = make_case(*shape, torch.bfloat16, device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            results(op, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(op, static)
    for seed in (1, 2):
        fresh = make_case(*shape, torch.bfloat16, device, seed=seed)
        with torch.no_grad():
            for old, new in zip(static.args(), fresh.args(), strict=True):
                old.copy_(new)
            static.grad.copy_(fresh.grad)
        graph.replay()
        for name, one, other in zip(RESULTS, captured, results(op, fresh), strict=True):
            assert torch.equal(one, other), name

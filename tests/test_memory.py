"""Nothing of size T*K*H or T*E is ever built, and the memory formula holds."""

import tracemalloc
from typing import Any

import pytest
import torch
from cases import make_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_moe import triton_flash_expert_func
from flash_moe.ops import product_keys
from flash_moe.ops.backends import load_backend, reference
from flash_moe.ops.overlap import WholeOutput
from flash_moe.ops.pairs import Pairs


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                stored = tensor.values() if tensor.layout == torch.sparse_csr else tensor
                self.elements = max(self.elements, stored.numel())
        return result


@pytest.mark.parametrize("backend", ["reference", "torch_sparse"])
def test_no_large_tensor_on_the_cpu(backend: str) -> None:
    num_tokens, hidden_size, num_experts, slots = 60, 64, 200, 40
    case = make_case(num_tokens, hidden_size, num_experts, slots)
    rows_TH, table_EH = case.hidden_states.detach(), case.down_weights.detach()
    pairs = Pairs.from_checked_indices(case.indices, num_experts)
    primitives = load_backend(backend)
    out = WholeOutput(rows_TH.shape, torch.float32, rows_TH.device)
    with reference.tuning(block_elements=4096), LargestTensor() as largest:
        values_N = primitives.sddmm(rows_TH, table_EH, pairs)
        primitives.spmm(values_N, table_EH, pairs, out.chunks)
        primitives.spmm_t(values_N, rows_TH, pairs, torch.float32)
    allowed = num_experts * hidden_size
    assert num_tokens * slots <= largest.elements <= allowed
    assert allowed < num_tokens * slots * hidden_size / 10


def test_choice_of_experts_forms_no_score_of_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, slots, side = 40, 32, 200
    first, second = torch.randn(2, num_tokens, side)
    candidates = sum(slots // (i + 1) for i in range(slots))
    largest_allowed = num_tokens * max(candidates, side)
    monkeypatch.setenv("FLASH_MOE_BACKEND", "reference")
    with LargestTensor() as largest:
        product_keys._choose(first, second, None, None, slots)
    assert num_tokens * candidates <= largest.elements <= largest_allowed
    monkeypatch.setenv("FLASH_MOE_BACKEND", "torch_sparse")
    tracemalloc.start()
    product_keys._choose(first, second, None, None, slots)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Of each candidate 32 bytes, and less of the chosen.
    assert 32 * num_tokens * candidates <= peak_bytes <= 64 * largest_allowed


@pytest.mark.gpu
def test_peak_memory_on_cuda(device: torch.device) -> None:
    num_tokens, hidden_size, num_experts, slots = 2048, 1024, 4096, 256
    case = make_case(num_tokens, hidden_size, num_experts, slots, torch.bfloat16, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = triton_flash_expert_func(*case.args())
    torch.autograd.grad(out, case.differentiable(), case.grad)
    extra = torch.cuda.max_memory_allocated() - before
    gathered = num_tokens * slots * hidden_size * 2
    assert extra < gathered / 10


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype", "weights_dtype"),
    [
        ((2048, 1024, 4096, 256), torch.bfloat16, torch.bfloat16),
        ((4096, 128, 4096, 256), torch.bfloat16, torch.float32),
        ((512, 1024, 4096, 2048), torch.float32, torch.float32),
        ((65536, 64, 4096, 8), torch.float16, torch.float16),
        ((2048, 2048, 4096, 64), torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_written_formula_of_memory(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """The formula in the docstring of triton_flash_expert_func."""
    case = make_case(*shape, dtype, device)
    case.routing_weights = case.routing_weights.detach().to(weights_dtype).requires_grad_()
    triton_flash_expert_func(*case.args(), backend="gather")
    num_tokens, hidden_size, _, slots = shape
    pairs = num_tokens * slots
    out_bytes = num_tokens * hidden_size * dtype.itemsize
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = triton_flash_expert_func(*case.args(), backend="gather")
    peak = torch.cuda.max_memory_allocated() - before
    kept = torch.cuda.memory_allocated() - before - out_bytes
    assert out.requires_grad
    row_bytes = hidden_size * dtype.itemsize
    slices = -(-row_bytes // 1024) if row_bytes > 2048 or slots <= 128 else 1
    written = max(16 * pairs + out_bytes, (12 + 4 * slices) * pairs)
    assert peak == pytest.approx(written, rel=0.05)
    assert kept == pytest.approx(12 * pairs, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hot_cold", "dense"])
def test_memory_of_products_is_bounded(backend: str, device: torch.device) -> None:
    """Memory is within what the docstring of triton_flash_expert_func adds to that of gathering."""
    num_tokens, hidden_size, num_experts, slots = 4096, 256, 80_000, 64
    case = make_case(num_tokens, hidden_size, num_experts, slots, torch.bfloat16, device)
    triton_flash_expert_func(*case.args(), backend=backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    triton_flash_expert_func(*case.args(), backend=backend)
    peak = torch.cuda.max_memory_allocated() - before
    pairs, rows = num_tokens * slots, num_tokens * hidden_size
    most = min(num_experts, pairs // (num_tokens * 19 // 1000))
    allowed = 16 * pairs + 2 * rows
    if backend == "dense":
        allowed += 4 * min(2**27, num_tokens * num_experts) + 8 * rows
    else:
        allowed += 2 * min(2**27, num_tokens * (most + 127)) + 16 * 4 * rows
        allowed += 4 * (num_experts + most + 3 * num_tokens) + 8 * num_tokens * (most // 32 + 1)
    assert peak < 1.05 * allowed
    assert num_tokens * num_experts > 2**27

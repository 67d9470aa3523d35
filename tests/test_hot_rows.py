"""Rows with thousands of uses, whose gradients a sum in 16 bits would cut short."""

import pytest
import torch
from cases import INTERPRETED_TOLERANCES, RESULTS, Case, assert_close, make_case, oracle

from flash_moe import triton_flash_expert_func
from flash_moe.ops.backend_choice import BACKENDS, TRITON_BACKENDS
from flash_moe.ops.naive import naive_expert_func

HIDDEN_SIZE = 8
# Triton's interpreter cannot multiply matrices in bfloat16, and takes long for gather's programs.
INTERPRETED = {"gather": torch.bfloat16, "hot_cold": torch.float16, "dense": torch.float16}
CASES = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.bfloat16, torch.float16)
    if torch.cuda.is_available() or INTERPRETED.get(backend, dtype) == dtype
]


def hot_case(uses: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A case in which one row has that many uses, all of one sign.

    A sum in bfloat16 would stop at about 256 uses, one in float16 at 2,048.
    """
    indices = torch.ones(uses, 1, dtype=torch.int64)
    case = make_case(uses, HIDDEN_SIZE, 3, 1, dtype, device, indices=indices)
    with torch.no_grad():
        for leaf in case.differentiable():
            leaf.abs_()
    case.grad.abs_()
    return case


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_hot_rows(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    where = device if backend in TRITON_BACKENDS else torch.device("cpu")
    interpreted = where.type == "cpu" and backend in TRITON_BACKENDS
    case = hot_case(320 if interpreted else 8192, dtype, where)
    out = triton_flash_expert_func(*case.args(), backend=backend)
    results = (out, *torch.autograd.grad(out, case.differentiable(), case.grad))
    for name, result, expected in zip(RESULTS, results, oracle(case), strict=True):
        # Backends of matrix products round their operands too.
        assert_close(result, expected, 2 * INTERPRETED_TOLERANCES[dtype], name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hot_rows_of_the_oracle(dtype: torch.dtype, device: torch.device) -> None:
    """All of its intermediate results are in 16 bits, but no sum."""
    case = hot_case(8192, dtype, device)
    out = naive_expert_func(*case.args())
    results = (out, *torch.autograd.grad(out, case.differentiable(), case.grad))
    for name, result, expected in zip(RESULTS, results, oracle(case), strict=True):
        assert_close(result, expected, 4 * INTERPRETED_TOLERANCES[dtype], name)

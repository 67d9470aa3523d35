"""Every Triton kernel at small odd shapes, for launch/sanitize.sh.

With --no-library-products nothing reads what cuBLAS wrote: to initcheck, which does not see how
cuBLAS writes on Hopper, a plain `a @ b` is memory never written.
"""

import sys
from collections.abc import Callable

import torch
from cases import make_case

from flash_moe import ragged_flash_expert_func, triton_flash_expert_func
from flash_moe.ops.backends.gather import spmm
from flash_moe.ops.indices import raise_index_errors
from flash_moe.ops.overlap import OutputChunk
from flash_moe.ops.pairs import Pairs

BACKENDS = ["gather", "hot_cold"]
if "--no-library-products" not in sys.argv:
    BACKENDS.append("dense")
CASES = [
    (dtype, shape, "gather")
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ((13, 7, 57, 5), (5, 1000, 33, 130), (3, 2880, 20, 600))
] + [
    (torch.bfloat16, shape, backend)
    for shape in ((106, 40, 400, 3), (5, 1000, 33, 130))
    for backend in BACKENDS[1:]
]
for dtype, shape, backend in CASES:
    case = make_case(*shape, dtype, "cuda")
    case.indices[1, 2] = -1
    out = triton_flash_expert_func(*case.args(), backend=backend)
    out.backward(case.grad)
    num_tokens, slots = case.indices.shape
    offsets = torch.arange(num_tokens + 1, device="cuda") * slots
    ragged = ragged_flash_expert_func(
        *case.args()[:3], offsets, case.indices.flatten(), case.routing_weights.flatten()
    )
    ragged.backward(case.grad)


# Output chunks, one of which is added to the sums of other ranks.
pairs = Pairs.from_checked_offsets(
    torch.tensor([0, 3, 3, 9], device="cuda"), torch.arange(9, device="cuda").int(), 9
)
table, values = torch.randn(9, 40, device="cuda"), torch.ones(9, device="cuda")
first, others = torch.empty(1, 40, device="cuda"), torch.ones(3, 2, 40, device="cuda")
rest = torch.empty(2, 40, device="cuda", dtype=torch.bfloat16)
chunks = [
    OutputChunk(slice(0, 1), first),
    OutputChunk(slice(1, 3), rest, accumulate_with=others, own_index=1),
]
spmm(values, table, pairs, lambda: chunks)
if not torch.allclose(rest[0], torch.full_like(rest[0], 2)):
    raise AssertionError("a row without pairs must be the sum of the two others")


def reported(call: Callable[[], object], message: str) -> None:
    """Kernels may meet bad ids and offsets before these are reported: never out of bounds."""
    try:
        call()
        torch.cuda.synchronize()
        raise_index_errors()
    except ValueError as error:
        if message not in str(error):
            raise
        print(f"reported: {error}")
    else:
        raise AssertionError("bad input went unnoticed")


case = make_case(3, 40, 33, 130, torch.bfloat16, "cuda")
num_pairs = case.indices.numel()
wrong = torch.tensor([0, num_pairs + 999, -7, num_pairs], device="cuda")
reported(
    lambda: ragged_flash_expert_func(
        *case.args()[:3], wrong, case.indices.flatten(), case.routing_weights.flatten()
    ),
    "row_offsets must ascend",
)
case.indices[0, 0], case.indices[2, 1] = 10**6, -5
for backend in BACKENDS:
    reported(
        lambda: triton_flash_expert_func(*case.args(), backend=backend),  # noqa: B023
        "ids from -5 to 1000000 were found",
    )
print("done")

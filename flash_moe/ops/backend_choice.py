"""The choice of a backend: from the argument, the environment, the device, and cost.

T tokens, H hidden size, E experts, N pairs, b bytes of an element. Cost follows from shapes alone.
A primitive that gathers reads N H b bytes; as a dense matrix product it does 2 T E H operations;
for one expert that `load` tokens use, gathering reads load H b bytes and a product does 2 T H
operations. Which experts are hot depends on the data: kernels find out, in arrays whose sizes
follow from the shapes, so no choice waits for the device, and CUDA graphs can be captured.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe.ops.environment import switch

BACKENDS = ("reference", "torch_sparse", "gather", "hot_cold", "dense")
TRITON_BACKENDS = ("gather", "hot_cold", "dense")


@dataclass(frozen=True)
class Rates:
    """Measured rates of a whole primitive on one H200.

    gather: bytes of table rows per second, where tokens share rows in cache.
    memory: bytes of table rows per second, each read from memory once.
    dense: 16-bit operations per second of products with all experts.
    hot: 16-bit operations per second of products with hot experts only.
    """

    gather: float = 8.0e12
    memory: float = 4.0e12
    dense: float = 570e12
    hot: float = 420e12


RATES = Rates()
HOT_PER_THOUSAND = round(1000 * RATES.gather / RATES.hot)
# Partitioning hot pairs takes time even where there are none: not worth it for shorter primitives.
MIN_SECONDS_FOR_HOT_COLD = 0.3e-3
# Below this, the stream switch costs more than the sort by expert that it would hide.
MIN_PAIRS_FOR_SIDE_STREAM = 2**17
# Up to this many slots of a token are sorted and partitioned in the registers of one program.
MAX_SORTED_SLOTS = 4096
PRODUCT_DTYPES = (torch.float16, torch.bfloat16)


def uses_triton(backend: str) -> bool:
    """Whether Triton kernels check ids, sort them within each token, and compute activations."""
    return backend in TRITON_BACKENDS


def partitions_hot_pairs(backend: str) -> bool:
    """Whether the pairs of hot experts are separated from the others within each token."""
    return backend == "hot_cold"


def supports_products(num_tokens: int, top_k: int, hidden_size: int, *dtypes: torch.dtype) -> bool:
    """Whether "hot_cold" and "dense" take such inputs; dtypes of hidden states and tables."""
    one_dtype = dtypes[0] in PRODUCT_DTYPES and all(dtype == dtypes[0] for dtype in dtypes)
    return one_dtype and num_tokens > 0 and hidden_size > 0 and 0 < top_k <= MAX_SORTED_SLOTS


def cheapest_backend(
    num_tokens: int, top_k: int, num_experts: int, hidden_size: int, element_bytes: int
) -> str:
    """Choose "gather", "dense" or "hot_cold", for inputs that `supports_products` accepts."""
    row_bytes = hidden_size * element_bytes
    num_pairs = num_tokens * top_k
    cached = num_pairs * row_bytes / RATES.gather
    gather = max(cached, min(num_pairs, num_experts) * row_bytes / RATES.memory)
    dense = max(
        2 * num_tokens * num_experts * hidden_size / RATES.dense,
        num_experts * row_bytes / RATES.memory,
    )
    if dense < gather:
        return "dense"
    return "hot_cold" if cached >= MIN_SECONDS_FOR_HOT_COLD else "gather"


def hot_threshold(num_tokens: int) -> int:
    """How many tokens must use an expert for a matrix product to be cheaper than gathering.

    Solves load H b / gather = 2 T H / hot for the load, with b = 2 and the two `Rates`.
    """
    return max(1, num_tokens * HOT_PER_THOUSAND // 1000)


def default_backend(device: torch.device) -> str:
    """Name the backend of FLASH_MOE_BACKEND or, where that is not set, the one for `device`.

    "gather" for CUDA tensors, and for CPU tensors when TRITON_INTERPRET=1; "torch_sparse" for other
    CPU tensors; "reference" for any other device.
    """
    name = os.environ.get("FLASH_MOE_BACKEND")
    if name is not None:
        return name
    if device.type == "cuda" or switch("TRITON_INTERPRET", False):
        return "gather"
    return "torch_sparse" if device.type == "cpu" else "reference"


def ragged_backend(name: str) -> str:
    """Name the backend for ragged rows where `name` was chosen.

    "gather" in place of "hot_cold" and "dense", which need the same number of pairs per token.
    """
    return "gather" if uses_triton(name) else name


def choose_backend(
    backend: str | None, hidden_TH: Tensor, down_EH: Tensor, up_EH: Tensor, top_k: int | None
) -> str:
    """Name the backend that runs the op.

    That is `backend` if given, else FLASH_MOE_BACKEND, else by device and, on CUDA, by cost.

    Args:
        backend: one of BACKENDS, or None.
        hidden_TH, down_EH, up_EH: arguments of the op.
        top_k: K; None for ragged rows.

    Raises:
        ValueError: there is no such backend, or it does not take these tensors.
    """
    name = default_backend(hidden_TH.device) if backend is None else backend
    check_backend(name, hidden_TH.device)
    if top_k is None or not uses_triton(name):
        return ragged_backend(name)
    (num_tokens, hidden_size), num_experts = hidden_TH.shape, down_EH.shape[0]
    dtypes = (hidden_TH.dtype, down_EH.dtype, up_EH.dtype)
    products = supports_products(num_tokens, top_k, hidden_size, *dtypes)
    if backend is None and "FLASH_MOE_BACKEND" not in os.environ:
        if not products or not hidden_TH.is_cuda:
            return name
        return cheapest_backend(
            num_tokens, top_k, num_experts, hidden_size, hidden_TH.element_size()
        )
    if name != "gather" and not products:
        raise ValueError(
            f"backend {name!r} takes hidden states and tables of one dtype, float16 or bfloat16, "
            f"at least one token and 1 to {MAX_SORTED_SLOTS} slots for each, got "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, {num_tokens} "
            f"tokens of hidden size {hidden_size}, {top_k} slots"
        )
    if name == "hot_cold" and not hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16:
        raise ValueError(
            "backend 'hot_cold' takes float16, not bfloat16, under Triton's interpreter, which "
            "cannot multiply bfloat16 matrices"
        )
    return name


def check_backend(name: str, device: torch.device) -> None:
    """Raise ValueError unless there is a backend of this name that works on `device`."""
    if name not in BACKENDS:
        raise ValueError(
            f"backend (or FLASH_MOE_BACKEND) must be one of {', '.join(BACKENDS)}, got {name!r}"
        )
    if name == "torch_sparse" and device.type != "cpu":
        raise ValueError(f"backend 'torch_sparse' takes tensors on the CPU, got {device}")
    interpreted = switch("TRITON_INTERPRET", False)
    if uses_triton(name) and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend {name!r} takes CUDA tensors (or CPU tensors when TRITON_INTERPRET=1 is "
            f"set before Triton is imported), got {device}"
        )

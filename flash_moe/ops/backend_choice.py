"""Which backend runs the op on a CUDA device, decided from shapes alone.

T tokens, H hidden size, E experts, N pairs, b bytes of an element. A primitive that gathers reads
N H b bytes; as a dense matrix product it does 2 T E H operations; for an expert that `load` tokens
use, load H b bytes or 2 T H operations. Which experts are hot is data: the device finds out, in
arrays whose size follows from the shapes, so no choice waits for it and CUDA graphs work.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("reference", "torch_sparse", "gather", "hot_cold", "dense")
TRITON_BACKENDS = ("gather", "hot_cold", "dense")


@dataclass(frozen=True)
class Rates:
    """What a primitive reaches on one H200, all that belongs to it included.

    gather, memory: bytes of table rows a second, shared in cache or each read from memory once;
    dense, hot: operations a second in 16 bits, with all experts and with those at hot places.
    """

    gather: float = 8.0e12
    memory: float = 4.0e12
    dense: float = 570e12
    hot: float = 420e12


RATES = Rates()
HOT_PER_THOUSAND = round(1000 * RATES.gather / RATES.hot)
# Setting hot pairs apart costs time even where there are none: not where a primitive takes less.
MIN_SECONDS_FOR_HOT_COLD = 0.3e-3
# Sorting fewer by expert takes less time than the host does to change streams.
MIN_PAIRS_FOR_SIDE_STREAM = 2**17
# A token's slots are sorted and set apart in the registers of one program up to this many.
MAX_SORTED_SLOTS = 4096
# Elements of the (tokens, places) matrix that is built at one time.
MATRIX_ELEMENTS = 2**27
PRODUCT_DTYPES = (torch.float16, torch.bfloat16)


def takes_products(num_tokens: int, slots: int, hidden_size: int, *dtypes: torch.dtype) -> bool:
    """Whether hot experts can be done by matrix products at all; dtypes of hidden and tables."""
    one_dtype = dtypes[0] in PRODUCT_DTYPES and all(dtype == dtypes[0] for dtype in dtypes)
    return one_dtype and num_tokens > 0 and hidden_size > 0 and 0 < slots <= MAX_SORTED_SLOTS


def cheapest_backend(
    num_tokens: int, slots: int, num_experts: int, hidden_size: int, element_bytes: int
) -> str:
    """ "gather", "dense" or "hot_cold", for inputs that `takes_products`."""
    row_bytes = hidden_size * element_bytes
    num_pairs = num_tokens * slots
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
    """Tokens that must use an expert to make its matrix product cheaper than gathering.

    load H b / gather = 2 T H / hot, solved for load, with b = 2.
    """
    return max(1, num_tokens * HOT_PER_THOUSAND // 1000)


def default_backend(device: torch.device) -> str:
    """Name of the backend for tensors on `device`, unless FLASH_MOE_BACKEND names one.

    Triton kernels for CUDA tensors, and for CPU tensors too when TRITON_INTERPRET=1;
    torch.sparse for other CPU tensors.
    """
    name = os.environ.get("FLASH_MOE_BACKEND")
    if name is not None:
        return name
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return "gather"
    return "torch_sparse" if device.type == "cpu" else "reference"


def ragged_backend(name: str) -> str:
    """The backend for ragged rows where `name` was chosen: pairs that no kernel set apart are
    gathered, whatever the experts' load."""
    return "gather" if name in TRITON_BACKENDS else name


def choose_backend(
    backend: str | None, hidden_TH: Tensor, down_EH: Tensor, up_EH: Tensor, slots: int | None
) -> str:
    """Name of the backend that runs the op; `slots` (K) is None for ragged rows.

    `backend` if given, else FLASH_MOE_BACKEND, else by device and, on CUDA, by cost.

    Raises:
        ValueError: there is no such backend, or it does not take these tensors.
    """
    name = default_backend(hidden_TH.device) if backend is None else backend
    check_backend(name, hidden_TH.device)
    if name not in TRITON_BACKENDS or slots is None:
        return ragged_backend(name)
    (num_tokens, hidden_size), num_experts = hidden_TH.shape, down_EH.shape[0]
    dtypes = (hidden_TH.dtype, down_EH.dtype, up_EH.dtype)
    products = takes_products(num_tokens, slots, hidden_size, *dtypes)
    if backend is None and "FLASH_MOE_BACKEND" not in os.environ:
        if not products or not hidden_TH.is_cuda:
            return name
        return cheapest_backend(
            num_tokens, slots, num_experts, hidden_size, hidden_TH.element_size()
        )
    if name != "gather" and not products:
        raise ValueError(
            f"backend {name!r} takes hidden states and tables of one dtype, float16 or bfloat16, "
            f"at least one token and 1 to {MAX_SORTED_SLOTS} slots for each, got "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, {num_tokens} "
            f"tokens of hidden size {hidden_size}, {slots} slots"
        )
    if name == "hot_cold" and not hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16:
        raise ValueError(
            "backend 'hot_cold' takes float16, not bfloat16, under Triton's interpreter, which "
            "multiplies no bfloat16 matrices"
        )
    return name


def check_backend(name: str, device: torch.device) -> None:
    """Raise ValueError unless there is a backend of that name and it works on `device`."""
    if name not in BACKENDS:
        raise ValueError(
            f"backend (or FLASH_MOE_BACKEND) must be one of {', '.join(BACKENDS)}, got {name!r}"
        )
    if name == "torch_sparse" and device.type != "cpu":
        raise ValueError(f"backend 'torch_sparse' takes tensors on the CPU, got {device}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name in TRITON_BACKENDS and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend {name!r} takes CUDA tensors (or CPU tensors when TRITON_INTERPRET=1 is "
            f"set before Triton is imported), got {device}"
        )

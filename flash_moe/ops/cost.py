"""Which backend runs the op on a CUDA device, decided from shapes alone.

T tokens, H hidden size, E experts, N pairs, b bytes of an element. A primitive that gathers reads
N H b bytes; as a dense matrix product it does 2 T E H operations; for an expert that `load` tokens
use, load H b bytes or 2 T H operations. Which experts are hot is data: the device finds out, in
arrays whose size follows from the shapes, so no choice waits for it and CUDA graphs work.
"""

from dataclasses import dataclass

import torch


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
LEAST_SECONDS_TO_SPLIT = 0.3e-3
# Sorting fewer by expert takes less time than the host does to change streams.
LEAST_PAIRS_ASIDE = 2**17
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
    return "hot_cold" if cached >= LEAST_SECONDS_TO_SPLIT else "gather"


def hot_threshold(num_tokens: int) -> int:
    """Tokens that must use an expert to make its matrix product cheaper than gathering.

    load H b / gather = 2 T H / hot, solved for load, with b = 2.
    """
    return max(1, num_tokens * HOT_PER_THOUSAND // 1000)

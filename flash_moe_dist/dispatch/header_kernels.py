"""Positions of the fields of a `Header`, for Triton kernels."""

import triton.language as tl

from flash_moe_dist.dispatch.header import Header

ROWS = tl.constexpr(int(Header.ROWS))
PAIRS = tl.constexpr(int(Header.PAIRS))
BAD_IDS = tl.constexpr(int(Header.BAD_IDS))
TOKENS = tl.constexpr(int(Header.TOKENS))
CHECKSUM = tl.constexpr(int(Header.CHECKSUM))
MAX_PAIRS = tl.constexpr(int(Header.MAX_PAIRS))
HEADER_FIELDS = tl.constexpr(len(Header))
# The header is 64 bits a field, a message 32 bits a word.
HEADER_WORDS = tl.constexpr(2 * len(Header))

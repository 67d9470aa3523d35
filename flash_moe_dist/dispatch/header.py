"""The header that each rank sends to every other rank in a forward pass.

W ranks, F = len(Header) fields of 64 bits; row w of a `header_WF` goes to rank w. With exact counts
the header is a message of its own, with static capacity it begins the message of the pairs.
"""

from enum import IntEnum


class Header(IntEnum):
    """Position of each field.

    ROWS        rows sent to that rank; 0 where every rank gets all rows
    PAIRS       pairs sent to that rank
    BAD_IDS     ids on the sending rank that are neither an expert nor -1
    TOKENS      tokens of the sending rank, or TOKENS_DO_NOT_FIT
    CHECKSUM    `RankInput.checksum` of the sending rank, or INVALID_INPUT
    MAX_PAIRS   the most pairs that the sending rank sends to any rank
    """

    ROWS = 0
    PAIRS = 1
    BAD_IDS = 2
    TOKENS = 3
    CHECKSUM = 4
    MAX_PAIRS = 5


HEADER_BYTES = 8 * len(Header)
# Number of tokens sent by a rank whose input exceeds the static capacity.
TOKENS_DO_NOT_FIT = -1
# Checksum sent by a rank whose input is wrong.
INVALID_INPUT = 0

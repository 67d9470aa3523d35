"""Recognition of data that is neither text nor uint16 token ids, by its content."""

import codecs
import io
import json
import re
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

# How much of a file is looked at for signatures, control characters and numbers.
HEAD_BYTES = 2**21
# First bytes of a file, and what it holds.
SIGNATURES = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"PK\x03\x04": "a zip archive (.zip, .npz, .pt)",
    b"\x1f\x8b\x08": "gzip-compressed data",
    b"\xfd7zXZ\x00": "xz-compressed data",
    b"\x28\xb5\x2f\xfd": "zstd-compressed data",
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"\x89HDF\r\n": "HDF5",
    b"MMIDIDX\x00": "an index of Megatron-LM (.idx); its tokens are in the .bin file beside it",
    b"\x80\x04\x95": "a pickle",
    b"%PDF-": "a PDF document",
}
TAR_SIGNATURE = slice(257, 262), b"ustar"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Text has hardly any; numbers of two and more bytes, and compressed data, have many.
CONTROL_CHARACTERS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
MOST_CONTROL_CHARACTERS = 0.01
# Fewer bytes may be text by chance.
LEAST_TEXT = 64
# Upper half of the largest id of 32 bits: vocabularies have fewer than 2^20 tokens.
LARGEST_UPPER_HALF = 15
# Upper half of a small negative number, which stands for padding.
NEGATIVE = 2**16 - 1
# Fewer ids may have any distribution of bytes by chance.
LEAST_IDS = 1000
# Magnitudes of floating-point numbers as files of ids, weights or activations hold them.
FLOATS = (2.0**-40, 2.0**40)
# The header is 256 int32: a date as a number, a version, the number of tokens, zeros.
LLMC_HEADER_BYTES = 1024
LLMC_DATES = (2024_01_01, 2029_12_31)


def foreign_to_text(content: bytes) -> str | None:
    """Name what a file holds that is not text; None if it may be text, a JSON document included."""
    head = content[:HEAD_BYTES]
    if found := _signature(head):
        return found
    if head.startswith(UTF_16):
        return "UTF-16, not UTF-8"
    controls = len(head) - len(head.translate(None, CONTROL_CHARACTERS))
    if controls > MOST_CONTROL_CHARACTERS * len(head):
        return "binary data"
    lines = list(islice((line for line in io.BytesIO(content) if line.strip()), 2))
    return "JSON lines" if len(lines) == 2 and all(map(is_json, lines)) else None


def is_json(content: bytes) -> bool:
    """Whether it is one JSON object or array."""
    content = content.removeprefix(codecs.BOM_UTF8)
    # Spares parsing what is none.
    if not re.match(rb"\s*[\[{]", content) or not re.search(rb"[\]}]\s*\Z", content[-HEAD_BYTES:]):
        return False
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def not_utf8(content: bytes) -> str | None:
    """Name the first byte at which `content` is not UTF-8; None if it is, but for a cut end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(content), HEAD_BYTES):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(content[start : start + HEAD_BYTES])
        except UnicodeDecodeError as error:
            offset = start - pending + error.start
            return f"text that is not UTF-8 (byte {content[offset]:#04x} at offset {offset:,})"
    return None


def foreign_to_uint16(head: bytes) -> str | None:
    """Name what a file holds that is not uint16 token ids; None if it may be these.

    head: its first `HEAD_BYTES`.
    """
    if found := _signature(head):
        return found
    if _has_llmc_header(head):
        return f"a shard of llm.c or modded-nanogpt, with a header of {LLMC_HEADER_BYTES} bytes"
    if _is_text(head):
        return "text"
    return _foreign_numbers(head)


def _signature(head: bytes) -> str | None:
    where, tar = TAR_SIGNATURE
    if head[where] == tar:
        return "a tar archive"
    return next((name for begin, name in SIGNATURES.items() if head.startswith(begin)), None)


def _has_llmc_header(head: bytes) -> bool:
    if len(head) < LLMC_HEADER_BYTES:
        return False
    date, version = np.frombuffer(head[:8], "<i4").tolist()
    first, last = LLMC_DATES
    return first <= date <= last and 0 < version < 100


def _is_text(head: bytes) -> bool:
    """Whether all is UTF-8 without control characters; the last character may be cut."""
    controls = any(byte in head for byte in CONTROL_CHARACTERS)
    return len(head) >= LEAST_TEXT and not controls and not_utf8(head) is None


def _foreign_numbers(head: bytes) -> str | None:
    """Name the numbers of another type than little-endian uint16."""
    numbers_N = np.frombuffer(head[: len(head) // 8 * 8], "<u2")
    if (width := _width_of_ids(numbers_N)) > 16:
        return f"token ids of {width} bits"
    if any(_are_floats(numbers_N, dtype) for dtype in ("<f4", "<f8", ">f4", ">f8")):
        return "floating-point numbers"
    # In groups of four, of which the order does not matter.
    swapped_N = numbers_N.view("<u8").byteswap().view("<u2")
    # In uint16 ids below 256, these bytes are the upper ones.
    if (swapped_N & 255).any() and (width := _width_of_ids(swapped_N)) > 16:
        return f"big-endian token ids of {width} bits"
    return "big-endian token ids of 16 bits" if _are_big_endian(numbers_N) else None


def _width_of_ids(numbers_N: npt.NDArray[Any]) -> int:
    """Bits of a token id, 16, 32 or 64, judged by its upper halves; N is a multiple of 4."""
    if not numbers_N.any():
        return 16
    lower, upper = numbers_N[::2], numbers_N[1::2]
    small = (upper <= LARGEST_UPPER_HALF) | (upper == NEGATIVE)
    # In uint16 ids both look alike; those of a vocabulary below 17 tokens are all small.
    if not small.all() or (upper.any() and np.median(lower[::2]) <= LARGEST_UPPER_HALF):
        return 16
    return 32 if numbers_N[2::4].any() or numbers_N[3::4].any() else 64


def _are_floats(numbers_N: npt.NDArray[Any], dtype: str) -> bool:
    """Whether these are floats of the usual magnitudes, but not if read from the second uint16 on.

    In uint16 ids, a float that begins with one has the same distribution as with the next.
    """

    def usual(numbers: npt.NDArray[Any]) -> float:
        floats = numbers[: len(numbers) // 4 * 4].view(dtype)
        size = np.abs(floats[floats != 0])
        return float(((size > FLOATS[0]) & (size < FLOATS[1])).mean()) if len(size) else 0.0

    return usual(numbers_N) > 0.99 and usual(numbers_N[1:]) < 0.9


def _are_big_endian(numbers_N: npt.NDArray[Any]) -> bool:
    """Whether the lower bytes of ids have fewer values than the upper ones.

    Ids from 0 to V - 1 have all 256 lower bytes, but only V / 256 upper ones.
    """
    if len(numbers_N) < LEAST_IDS:
        return False
    lower, upper = (
        int(np.count_nonzero(np.bincount(byte_N, minlength=256)))
        for byte_N in (numbers_N & 255, numbers_N >> 8)
    )
    # A few ids may share lower bytes by chance, but hardly one of 0.
    only_zero = upper > 2 and not (numbers_N & 255).any()
    return only_zero or (upper >= 64 and lower < 0.8 * upper)

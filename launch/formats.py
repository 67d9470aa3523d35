"""Recognition of files that hold neither text nor uint16 token ids, by their first bytes."""

import codecs
import json
from typing import Any

import numpy as np
import numpy.typing as npt

# How much of a file is looked at.
HEAD_BYTES = 2**21
# First bytes of a file, and what it holds.
SIGNATURES = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"PK\x03\x04": "a zip archive (.zip, .npz, .pt)",
    b"\x1f\x8b\x08": "gzip-compressed data",
    b"BZh91AY&SY": "bzip2-compressed data",
    b"\xfd7zXZ\x00": "xz-compressed data",
    b"\x28\xb5\x2f\xfd": "zstd-compressed data",
    b"\x04\x22\x4d\x18": "lz4-compressed data",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"FEA1": "a Feather table",
    b"Obj\x01": "an Avro table",
    b"\x89HDF\r\n": "HDF5",
    b"SQLite format 3\x00": "an SQLite database",
    b"MMIDIDX\x00": "an index of Megatron-LM (.idx); its tokens are in the .bin file beside it",
    b"\x80\x04\x95": "a pickle",
    b"\x80\x05\x95": "a pickle",
    b"%PDF-": "a PDF document",
    b"\x89PNG\r\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x7fELF": "a program",
}
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# UTF-8 text has none; numbers of two and more bytes have many.
MOST_NUL_BYTES = 0.01
# Fewer bytes may be text by chance.
LEAST_TEXT = 64
# Upper half of the largest id of 32 bits: vocabularies have fewer than 2^20 tokens.
LARGEST_UPPER_HALF = 15
# Upper half of a small negative number, which stands for padding.
NEGATIVE = 2**16 - 1
# The header is 256 int32: a date as a number, a version, the number of tokens, zeros.
LLMC_HEADER_BYTES = 1024
LLMC_DATES = (2024_01_01, 2029_12_31)


def foreign_to_text(head: bytes) -> str | None:
    """Name what a file holds that is not text; None if it may be text.

    head: its first `HEAD_BYTES`.
    """
    if found := _signature(head):
        return found
    if head.startswith(UTF_16):
        return "UTF-16, not UTF-8"
    if MOST_NUL_BYTES * len(head) < head.count(0) < len(head):
        return "binary data"
    return "JSON lines" if _is_json_lines(head) else None


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
    width = _width_of_ids(np.frombuffer(head[: len(head) // 8 * 8], "<u2"))
    return None if width == 16 else f"token ids of {width} bits"


def _signature(head: bytes) -> str | None:
    return next((name for begin, name in SIGNATURES.items() if head.startswith(begin)), None)


def _is_json_lines(head: bytes) -> bool:
    """Whether the first two lines that are not empty are a JSON object or array each."""
    lines = [line for line in head.split(b"\n") if line.strip()][:2]
    return len(lines) == 2 and all(map(_is_json, lines))


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _has_llmc_header(head: bytes) -> bool:
    if len(head) < LLMC_HEADER_BYTES:
        return False
    date, version = np.frombuffer(head[:8], "<i4").tolist()
    first, last = LLMC_DATES
    return first <= date <= last and 0 < version < 100


def _is_text(head: bytes) -> bool:
    """Whether all is UTF-8 without control characters; the last character may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(head) >= LEAST_TEXT and all(char >= " " or char in "\t\n\r\f" for char in text)


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

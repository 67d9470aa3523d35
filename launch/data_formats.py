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
# What a file begins with, as a regular expression, and what it holds.
SIGNATURES = {
    rb"\x93NUMPY": "a NumPy array (.npy)",
    rb"PK\x03\x04": "a zip archive (.zip, .npz, .pt)",
    rb".{257}ustar": "a tar archive",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"\x1f\x8b\x08": "gzip-compressed data",
    rb"BZh[1-9]1AY&SY": "bzip2-compressed data",
    rb"\xfd7zXZ\0": "xz-compressed data",
    rb"\x28\xb5\x2f\xfd": "zstd-compressed data",
    rb"\x04\x22\x4d\x18": "lz4-compressed data",
    rb"PAR1": "a Parquet table",
    rb"ARROW1": "an Arrow or Feather table",
    rb"FEA1": "a Feather table",
    rb"Obj\x01": "an Avro table",
    rb"\x89HDF\r\n": "HDF5",
    rb"SQLite format 3\0": "an SQLite database",
    rb"MMIDIDX\0": "an index of Megatron-LM (.idx); its tokens are in the .bin file beside it",
    # A frame's length; or else a list or dict, an instance, a tuple of numbers, bytes or a
    # string, the number that PyTorch wrote before it wrote zip archives.
    rb"\x80[\x04\x05]\x95.{6}\0\0": "a pickle",
    rb"\x80[\x02-\x05]([]}](q\0|\x94)|c[_a-z]{3}|\([KMJ]|[BX].{3}\0|\x8a\nl\xfc)": "a pickle",
    rb"%PDF-": "a PDF document",
    rb"\x89PNG\r\n": "a PNG image",
    rb"\xff\xd8\xff[\xc0-\xfe]": "a JPEG image",
    rb"\x7fELF": "a program",
}
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
# Fewer numbers may have any distribution of bytes by chance.
LEAST_NUMBERS = 1000
# Floating-point numbers have larger halves.
SMALL_VOCABULARY = 8192
# Magnitudes of floating-point numbers as files of ids, weights or activations hold them.
FLOATS = (2.0**-40, 2.0**40)
# The header is 256 int32: a date as a number, a version, the number of tokens, zeros.
LLMC_HEADER_BYTES = 1024
LLMC_DATES = (2024_01_01, 2029_12_31)


def foreign_to_text(content: bytes) -> str | None:
    """Name what a file holds that is not text; None if it may be text, JSON included."""
    head = content[:HEAD_BYTES]
    if found := _signature(head):
        return found
    if head.startswith(UTF_16):
        return "UTF-16, not UTF-8"
    controls = len(head) - len(head.translate(None, CONTROL_CHARACTERS))
    return "binary data" if controls > MOST_CONTROL_CHARACTERS * len(head) else None


def is_json_lines(content: bytes) -> bool:
    """Whether the first two lines that are not empty are a JSON object or array each."""
    lines = list(islice((line for line in io.BytesIO(content) if line.strip()), 2))
    return len(lines) == 2 and all(map(is_json, lines))


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
    return next((name for begin, name in SIGNATURES.items() if re.match(begin, head, re.S)), None)


def _has_llmc_header(head: bytes) -> bool:
    if len(head) < LLMC_HEADER_BYTES:
        return False
    date, version = np.frombuffer(head[:8], "<i4").tolist()
    first, last = LLMC_DATES
    return first <= date <= last and 0 < version < 100


def _is_text(head: bytes) -> bool:
    """Whether all is UTF-8 without control characters; the last character may be cut."""
    controls = any(byte in head for byte in CONTROL_CHARACTERS)
    # A few token ids that are repeated may be printable by chance.
    has_words = len(head) >= LEAST_TEXT and len(set(head)) > 4
    return has_words and not controls and not_utf8(head) is None


def _foreign_numbers(head: bytes) -> str | None:
    """Name the numbers of another type than little-endian uint16; None where these are in doubt."""
    numbers_N = np.frombuffer(head[: len(head) // 8 * 8], "<u2")
    if (width := _width_of_ids(numbers_N)) > 16:
        return f"token ids of {width} bits"
    if len(numbers_N) < LEAST_NUMBERS:
        return None
    if any(_are_floats(numbers_N, dtype) for dtype in ("<f4", "<f8", ">f4", ">f8")):
        return "floating-point numbers"
    # In groups of four, of which the order does not matter.
    swapped_N = numbers_N.view("<u8").byteswap().view("<u2")
    width = _width_of_ids(swapped_N)
    # Of wider ids, the upper halves hold no lower byte.
    lower_halves_N = numbers_N[width // 16 - 1 :: width // 16]
    has_large = width > 16 and swapped_N[1::2].any()
    if has_large or _are_big_endian(lower_halves_N):
        return f"big-endian token ids of {width} bits"
    return None


def _width_of_ids(numbers_N: npt.NDArray[Any]) -> int:
    """Bits of a token id, 16, 32 or 64, judged by its upper halves; N is a multiple of 4."""
    lower, upper = numbers_N[::2], numbers_N[1::2]
    lower, upper = lower[upper != NEGATIVE], upper[upper != NEGATIVE]
    if (upper > LARGEST_UPPER_HALF).any():
        return 16
    distinct = len(np.unique(lower))
    # Where some ids of 32 bits exceed 2^16, some do not, and lower halves have many values.
    if upper.any() and (upper.min() > 0 or lower.max() < 2**15 or distinct < 256):
        return 16
    if distinct < 2:
        return 16
    return 32 if numbers_N[2::4].any() or numbers_N[3::4].any() else 64


def _are_floats(numbers_N: npt.NDArray[Any], dtype: str) -> bool:
    """Whether these are floats of the usual magnitudes, but not if read from the second uint16 on.

    In uint16 ids, a float that begins with one has the same distribution as with the next. The last
    16 bits of real numbers have any value, and those of integers end in zeros; the first 16, with
    sign and exponent, have many values.
    """

    def usual(numbers: npt.NDArray[Any]) -> float:
        floats = numbers[: len(numbers) // 4 * 4].view(dtype)
        size = np.abs(floats[floats != 0])
        return float(((size > FLOATS[0]) & (size < FLOATS[1])).mean()) if len(size) else 0.0

    bits = numbers_N.view(dtype.replace("f", "u"))
    first_16, last_16 = bits >> 8 * bits.itemsize - 16, bits & 2**16 - 1
    return bool(
        numbers_N.max() >= SMALL_VOCABULARY
        and (last_16.max() >= 15 * 2**12 or not (last_16 & 255).any())
        and len(np.unique(first_16)) >= 8
        and usual(numbers_N) > 0.99
        and usual(numbers_N[1:]) < 0.9
    )


def _are_big_endian(numbers_N: npt.NDArray[Any]) -> bool:
    """Whether ids with their bytes swapped fill a range from 0, and as they are do not.

    Ids from 0 to V - 1 have all 256 lower bytes, but of upper ones only those from 0 to V / 256.
    Multiples of a number leave out bytes in between.
    """
    lower, upper = np.unique(numbers_N & 255), np.unique(numbers_N >> 8)
    # A few ids may share lower bytes by chance, but hardly one of 0.
    least = 64 if lower.any() else 3
    fills_range = len(lower) > 0.7 * (lower.max() + 1) and np.gcd.reduce(upper) == 1
    return bool(len(upper) >= least and lower.max() < 0.8 * upper.max() and fills_range)

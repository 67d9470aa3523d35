"""Highest rates of a device, measured: bytes/s of copies and row gathers, FLOP/s of matmuls."""

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from flash_moe.bench.device_rates_kernels import gather_kernel
from flash_moe.bench.measure import Clock

REPEATS = {"cuda": 20, "cpu": 3}
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
# Tokens, row size in bytes, table rows, rows of each token.
GATHERED = (4096, 2048, 102_400, 512)
# Columns of the wide factor.
MATRIX_COLUMNS = {"cuda": 102_400, "cpu": 4096}


@dataclass(frozen=True)
class DeviceRates:
    """Bytes/s of a copy (read and written) and of gathered rows, FLOP/s of matrix products."""

    copy: float
    gather: float
    matrix: float


@dataclass(frozen=True)
class GatherShape:
    """Tile sizes of the gather kernel.

    pairs: rows summed by a program.
    rows: rows loaded at once.
    block_words: int32 words of each row loaded at once.
    warps: warps of a program.
    """

    pairs: int
    rows: int
    block_words: int
    warps: int


GATHER_SHAPES = (
    GatherShape(64, 4, 256, 1),
    GatherShape(64, 4, 512, 1),
    GatherShape(64, 8, 256, 1),
    GatherShape(512, 8, 512, 4),
)


def measure_device_rates(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Measure all rates, once for each device and dtype.

    On the CPU the rate of a copy stands for that of a gather, and matmuls are in float32.
    """
    copied = copy_rate(device)
    if device.type == "cpu":
        return DeviceRates(copied, copied, matrix_rate(device, torch.float32))
    return DeviceRates(copied, gather_rate(device), matrix_rate(device, dtype))


@cache
def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy within the device's memory, read and written bytes added."""
    source = torch.ones(COPIED_BYTES[device.type], device=device, dtype=torch.int8)
    target = torch.zeros_like(source)
    seconds = Clock(device).median(lambda: target.copy_(source), REPEATS[device.type])
    return 2 * source.nbytes / seconds


@cache
def gather_rate(device: torch.device) -> float:
    """Bytes/s of gathered table rows, with the best of GATHER_SHAPES.

    Ids are sorted within each token, as the op's kernels have them.
    """
    tokens, row_bytes, rows, slots = GATHERED
    table = torch.randint(2**31 - 1, (rows, row_bytes // 4), device=device, dtype=torch.int32)
    ids = torch.randint(rows, (tokens, slots), device=device, dtype=torch.int32).sort().values
    clock = Clock(device)
    seconds = min(
        clock.median(partial(sum_rows, table, ids, shape), REPEATS[device.type])
        for shape in GATHER_SHAPES
    )
    return ids.numel() * row_bytes / seconds


def sum_rows(table: Tensor, ids: Tensor, shape: GatherShape) -> Tensor:
    """Gather table rows and sum all their words, wrapping; `gather_kernel` gives the formula.

    Args:
        table: (rows, words) int32.
        ids: (tokens, slots) int32, rows to gather; `shape.pairs` divides slots.

    Returns:
        (tokens, slots // shape.pairs) int32, a sum for each run of `shape.pairs` ids.
    """
    tokens, slots = ids.shape
    programs = slots // shape.pairs
    out = torch.empty(tokens, programs, device=ids.device, dtype=torch.int32)
    gather_kernel[(tokens, programs)](
        table,
        ids,
        out,
        WORDS=table.shape[1],
        SLOTS=slots,
        PAIRS=shape.pairs,
        ROWS=shape.rows,
        BLOCK_WORDS=shape.block_words,
        num_warps=shape.warps,
    )
    return out


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the two matmuls of a dense forward pass with T = H = 1024, timed together.

    In float32 without TF32, PyTorch's default.
    """
    side, columns = 1024, MATRIX_COLUMNS[device.type]
    narrow = torch.randn(side, side, device=device).to(dtype)
    wide = torch.randn(side, columns, device=device).to(dtype)
    tall = torch.randn(columns, side, device=device).to(dtype)
    clock = Clock(device)
    seconds = sum(
        clock.median(partial(torch.mm, *factors), REPEATS[device.type])
        for factors in ((narrow, wide), (wide, tall))
    )
    return 2 * 2 * side * side * columns / seconds

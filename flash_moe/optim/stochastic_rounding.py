"""Stochastic rounding to bfloat16, with random numbers that depend on the element alone."""

import torch
from torch import Tensor

# Constants of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195), as signed numbers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def round_stochastically(values: Tensor, rows: Tensor, touches: Tensor, seed: int) -> Tensor:
    """Round float32 values (U, H) to bfloat16: up or down, on average to the value itself.

    The same on any number of ranks: the random number of an element follows from the seed, its row
    and column in the whole table, and how often its row was touched.

    Args:
        rows: (U,) rows of the whole table.
        touches: (U,) how often each was touched before.
    """
    columns = torch.arange(values.shape[1], device=values.device)
    keys = _mix(_mix(rows.long() + start_of_seed(seed)) + touches.long() * GOLDEN)
    noise = _mix(keys.unsqueeze(1) + columns * GOLDEN) & 0xFFFF
    bits = values.view(torch.int32)
    rounded = ((bits.long() + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def start_of_seed(seed: int) -> int:
    """Number that rows are counted from, as a signed number modulo 2^64."""
    return (seed * GOLDEN + 2**63) % 2**64 - 2**63


def _mix(numbers: Tensor) -> Tensor:
    """Mix the bits of int64 numbers, modulo 2^64."""
    numbers = (numbers ^ _shifted(numbers, 30)) * FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, places: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (numbers >> places) & ((1 << (64 - places)) - 1)

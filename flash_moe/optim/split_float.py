"""Float32 numbers as a bfloat16 and the 16 bits that it lacks, exactly, bit by bit."""

import torch
from torch import Tensor


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 numbers whose upper half, rounded, is `high`.

    Args:
        high: bfloat16.
        low: int16, the lower 16 bits as a signed number: what to add to the bits of `high`.
    """
    bits = high.view(torch.int16).to(torch.int32) << 16
    return (bits + low.to(torch.int32)).view(torch.float32)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return `value` rounded to the nearest bfloat16, and the `low` that gives it back by `join`.

    Halfway cases round away from zero.
    """
    bits = value.view(torch.int32)
    # Sign-extended.
    low = (bits << 16) >> 16
    high = (bits - low) >> 16
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)

"""The dtype of sums."""

import torch


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which products of these dtypes are summed: float64 if any is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32

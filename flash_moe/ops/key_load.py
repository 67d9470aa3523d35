"""Load of the keys of a product-key grid: a custom op that waits for nothing on the host."""

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import default_backend, uses_triton
from flash_moe.ops.observation import is_observed
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2

# Pairs of a program, and the most bins of its histogram, which is in shared memory.
BLOCK_PAIRS, MAX_BINS = 4096, 2**13


def count_keys(indices: Tensor, num_first: int, num_second: int) -> Tensor:
    """Count the chosen experts of each key.

    Args:
        indices: experts i * num_second + j, int64 of any shape.
        num_first, num_second: A and B, numbers of keys of the two axes.

    Returns:
        (A + B,) int64: experts chosen with each first key i, then with each second key j.
    """
    # The dispatch of a custom op takes longer than the rest.
    plain = type(indices) is Tensor and not indices.is_meta and not is_observed()
    count = _count if plain else _count_op
    return count(indices, num_first, num_second)


def _count(indices: Tensor, num_first: int, num_second: int) -> Tensor:
    counts = indices.new_zeros(num_first + num_second)
    bins = next_power_of_2(max(num_first, num_second) + 1)
    if not uses_triton(default_backend(indices.device)) or bins > MAX_BINS:
        flat = indices.flatten()
        keys = torch.cat([flat // num_second, flat % num_second + num_first])
        return counts.scatter_add_(0, keys, torch.ones_like(keys))
    from flash_moe.ops.key_load_kernels import count_keys_kernel

    if indices.numel() > 0:
        launch(
            count_keys_kernel,
            (cdiv(indices.numel(), BLOCK_PAIRS), 2),
            indices.contiguous(),
            counts,
            indices.numel(),
            num_first,
            num_second,
            BLOCK=BLOCK_PAIRS,
            BINS=bins,
        )
    return counts


_count_op = torch.library.custom_op("flash_moe::count_keys", _count, mutates_args=())


@_count_op.register_fake
def _(indices: Tensor, num_first: int, num_second: int) -> Tensor:
    return indices.new_empty(num_first + num_second)

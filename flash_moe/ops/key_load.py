"""Load of the keys of a product-key grid: a custom op that waits for nothing on the host."""

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import default_backend, uses_triton
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2

# Pairs of a program.
BLOCK_PAIRS = 4096


@torch.library.custom_op("flash_moe::count_keys", mutates_args=())
def count_keys(indices: Tensor, num_first: int, num_second: int) -> Tensor:
    """Count the chosen experts of each key.

    Args:
        indices: experts i * num_second + j, int64 of any shape.
        num_first, num_second: A and B, numbers of keys of the two axes.

    Returns:
        (A + B,) int64: experts chosen with each first key i, then with each second key j.
    """
    if not uses_triton(default_backend(indices.device)):
        flat = indices.flatten()
        return torch.cat(
            [
                torch.bincount(flat // num_second, minlength=num_first),
                torch.bincount(flat % num_second, minlength=num_second),
            ]
        )
    from flash_moe.ops.key_load_kernels import count_keys_kernel

    counts = indices.new_zeros(num_first + num_second)
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
            BINS=next_power_of_2(max(num_first, num_second) + 1),
        )
    return counts


@count_keys.register_fake
def _(indices: Tensor, num_first: int, num_second: int) -> Tensor:
    return indices.new_empty(num_first + num_second)

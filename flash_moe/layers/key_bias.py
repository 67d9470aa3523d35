"""Balancing without a loss: a bias for each key that counts for the choice of experts alone."""

import torch
from torch import Tensor

from flash_moe.layers.recomputation import accumulate
from flash_moe.layers.wide_buffers import WideBuffers
from flash_moe.ops.sum_over_ranks import SumOverRanks


class KeyBias(WideBuffers):
    """Biases of the keys of both axes, moved after each optimizer step towards an even load.

    A key's load is the number of chosen (token, expert) pairs with that key since the last step,
    over all data-parallel ranks; its bias then grows by rate * sign(mean load - load), the mean
    being over the keys of its axis. (Of experts instead of keys: Wang et al. 2024,
    arXiv:2408.15664.)

    Args:
        key_grid: A and B, numbers of keys of the two axes.
        rate: change of a bias in a step, in units of the scores.
        device: where the biases live.
    """

    bias: Tensor
    accumulators = ("load",)

    def __init__(
        self, key_grid: tuple[int, int], rate: float, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.key_grid, self.rate = key_grid, rate
        num_keys = sum(key_grid)
        self.register_buffer("bias", torch.zeros(num_keys, dtype=torch.float32, device=device))
        self.load = torch.zeros(num_keys, dtype=torch.int64, device=device)

    def reset_parameters(self) -> None:
        self.bias.zero_()
        self.load.zero_()

    @torch.no_grad()
    def add(self, counts: Tensor) -> None:
        """Add the chosen experts of each key (A + B,) to the load, unless a pass is repeated."""
        if self.load.device != counts.device:
            # A state dict was assigned to a module on the meta device.
            self.load = torch.zeros_like(counts)
        accumulate(self.load, counts)

    @torch.no_grad()
    def update(self, sum_over_ranks: SumOverRanks | None) -> None:
        """Move the biases by the load since the last update. Collective over the ranks."""
        if sum_over_ranks is not None:
            sum_over_ranks(self.load)
        for bias, load in zip(
            self.bias.split(self.key_grid), self.load.split(self.key_grid), strict=True
        ):
            # Integers: a load equal to the mean leaves the bias as it is.
            bias += self.rate * (load.sum() - load * len(load)).sign()
        self.load.zero_()

    def extra_repr(self) -> str:
        return f"key_grid={self.key_grid}, rate={self.rate}"

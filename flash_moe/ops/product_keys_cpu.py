"""The K best of all sums of two keys' scores on a CPU, by NumPy's vectorized partition.

T tokens, A and B keys of the two axes, N of either, C candidates: ranks (i, j) in both sorted axes.
t tokens of a chunk. An id is packed with its score, so that no two are equal and one comparison
orders both: into an int64 below a float32, or as the imaginary part of a complex128 beside a
float64. It is inverted, so that of equal scores the one with the lowest id is the largest.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# Of an id below a packed float32.
ID_BITS = 0x7FFFFFFF
# Packed scores of a chunk, 1 MB: more leave the cache, fewer wait for the interpreter's lock.
CHUNK_NUMBERS = 2**17


def choose_on_cpu(
    first_TA: Tensor,
    second_TB: Tensor,
    first_bias_A: Tensor | None,
    second_bias_B: Tensor | None,
    ranks_2C: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Return the best sums, biases included, and their indices: (T, k), best first.

    Scores and biases are float32, or all float64. The threads of `torch.get_num_threads` share the
    chunks: NumPy releases the interpreter's lock.
    """
    num_tokens, num_second = second_TB.shape
    sums_TK = first_TA.new_empty(num_tokens, k)
    indices_TK = torch.empty(num_tokens, k, dtype=torch.int64)
    sums, indices, ranks = sums_TK.numpy(), indices_TK.numpy(), ranks_2C.long().numpy()
    axes = [
        (scores.numpy(), np.zeros(1, sums.dtype) if bias is None else bias.numpy() + 0.0)
        for scores, bias in ((first_TA, first_bias_A), (second_TB, second_bias_B))
    ]
    widest = max(first_TA.shape[1], num_second, ranks.shape[1])
    step = max(1, min(CHUNK_NUMBERS // widest, num_tokens))
    # Claimed one by one: a thread that gets less of its core does fewer.
    unclaimed = deque(range(0, num_tokens, step))
    num_threads = min(torch.get_num_threads(), len(unclaimed))

    def choose_chunks() -> None:
        chunk = _Chunk(step * widest, sums.dtype)
        while True:
            try:
                begin = unclaimed.popleft()
            except IndexError:
                return
            rows = slice(begin, begin + step)
            # Sums may overflow, and infinities of both signs have none.
            with np.errstate(over="ignore", invalid="ignore"):
                first, second = (chunk.best_keys(scores[rows], bias, k) for scores, bias in axes)
                best = chunk.best_sums(first, second, ranks, num_second, k)
            sums[rows], indices[rows] = best.values, best.ids

    if num_threads <= 1:
        choose_chunks()
    else:
        # Not kept for later calls: a forked process would wait for threads that it lacks.
        with ThreadPoolExecutor(num_threads - 1) as pool:
            helpers = [pool.submit(choose_chunks) for _ in range(num_threads - 1)]
            choose_chunks()
        for helper in helpers:
            helper.result()
    return sums_TK, indices_TK


class _Best(NamedTuple):
    """The best values of each row, best first, and their ids int64: (t, count) both."""

    values: Array
    ids: Array


class _Chunk:
    """Scratch memory of a thread, used again for each chunk: new memory costs page faults."""

    def __init__(self, numbers: int, dtype: npt.DTypeLike) -> None:
        self.values, self.more_values = (np.empty(numbers, dtype) for _ in range(2))
        self.ids, self.more_ids = (np.empty(numbers, np.int64) for _ in range(2))
        self.packed = np.empty(numbers, np.complex128 if dtype == np.float64 else np.int64)

    def best_keys(self, scores: Array, bias: Array, k: int) -> _Best:
        """Choose from scores (t, N), plus a bias (N,) or (1,) that is no negative zero."""
        # -0 becomes 0.
        values = np.add(scores, bias, out=_shaped(self.values, scores.shape))
        return self._best(values, ID_BITS - np.arange(scores.shape[1]), min(k, scores.shape[1]))

    def best_sums(
        self, first: _Best, second: _Best, ranks: Array, num_second: int, k: int
    ) -> _Best:
        values = self._at_ranks(first.values, ranks[0], self.values)
        values += self._at_ranks(second.values, ranks[1], self.more_values)
        inverted = self._at_ranks(ID_BITS - first.ids * num_second, ranks[0], self.ids)
        inverted -= self._at_ranks(second.ids, ranks[1], self.more_ids)
        return self._best(values, inverted, k)

    def _at_ranks(self, array: Array, ranks: Array, out: Array) -> Array:
        # Other modes than "clip" copy `out`.
        out = _shaped(out, (len(array), len(ranks)))
        return np.take(array, ranks, axis=1, out=out, mode="clip")

    def _best(self, values: Array, inverted_ids: Array, count: int) -> _Best:
        packed = _shaped(self.packed, values.shape)
        if values.dtype == np.float64:
            packed.real, packed.imag = values, inverted_ids
        else:
            # Integers in the order of the floats.
            bits = values.view(np.int32)
            ordered = _shaped(self.more_values, values.shape).view(np.int32)
            np.right_shift(bits, 31, out=ordered)
            ordered &= 0x7FFFFFFF
            ordered ^= bits
            packed[:] = ordered
            packed <<= 32
            packed |= inverted_ids
        left_out = packed.shape[1] - count
        if left_out > 0:
            packed.partition(left_out, axis=1)
        best = packed[:, left_out:]
        best.sort(axis=1)
        best = best[:, ::-1]
        if values.dtype == np.float64:
            return _Best(best.real.copy(), ID_BITS - best.imag.astype(np.int64))
        ordered = (best >> 32).astype(np.int32)
        ordered ^= (ordered >> 31) & 0x7FFFFFFF
        return _Best(ordered.view(np.float32), ID_BITS - (best & ID_BITS))


def _shaped(flat: Array, shape: tuple[int, ...]) -> Array:
    return flat[: shape[0] * shape[1]].reshape(shape)

"""The K best of all sums of two keys' scores on a CPU, by NumPy's vectorized partition.

T tokens, A and B keys of the two axes, N of either, C candidates: ranks (i, j) in both sorted axes.
t tokens of a chunk. Each score is packed above -1 - id, so that no two are equal and one comparison
orders both: of equal scores, the one with the lowest id is the largest. A float32 and its id are
the halves of an int64, a float64 and its id the parts of a complex128.
"""

from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# Of an int64 on a little-endian machine.
HALVES = np.dtype([("id", np.int32), ("score", np.int32)])
SIGN_BIT = -(2**31)
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
    sums, indices = sums_TK.numpy(), indices_TK.numpy()
    axes = [
        (scores.numpy(), None if bias is None else bias.numpy())
        for scores, bias in ((first_TA, first_bias_A), (second_TB, second_bias_B))
    ]
    # Sorted with the best last.
    columns = [
        min(k, scores.shape[1]) - 1 - ranks
        for (scores, _), ranks in zip(axes, ranks_2C.long().numpy(), strict=True)
    ]
    widest = max(first_TA.shape[1], num_second, ranks_2C.shape[1])
    step = max(1, min(CHUNK_NUMBERS // widest, num_tokens))
    # Claimed one by one: a thread that gets less of its core does fewer.
    unclaimed = deque(range(0, num_tokens, step))
    num_threads = min(torch.get_num_threads(), len(unclaimed))
    chunk_type = _Float64Chunk if sums.dtype == np.float64 else _Float32Chunk

    def choose_chunks() -> None:
        chunk = chunk_type(step * widest)
        while True:
            try:
                begin = unclaimed.popleft()
            except IndexError:
                return
            rows = slice(begin, begin + step)
            # Sums may overflow, and infinities of both signs have none.
            with np.errstate(over="ignore", invalid="ignore"):
                first, second = (chunk.best_keys(scores[rows], bias, k) for scores, bias in axes)
                best = chunk.best_sums(first, second, columns, num_second, k)[:, ::-1]
            sums[rows], indices[rows] = chunk.scores(best), chunk.ids(best)
            # -1 - id becomes the id.
            np.invert(indices[rows], out=indices[rows])

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


class _Chunk(ABC):
    """Scratch memory of a thread, used again for each chunk: new memory costs page faults."""

    def __init__(self, numbers: int, dtype: npt.DTypeLike, packed_dtype: npt.DTypeLike) -> None:
        self.values = np.empty(numbers, dtype)
        self.packed, self.more_packed = (np.empty(numbers, packed_dtype) for _ in range(2))

    def best_keys(self, scores: Array, bias: Array | None, k: int) -> Array:
        """Return the min(k, N) best of scores (t, N) plus a bias (N,), packed, the best last."""
        if bias is not None:
            scores = np.add(scores, bias, out=_shaped(self.values, scores.shape))
        packed = _shaped(self.packed, scores.shape)
        self.ids(packed)[:] = -1 - np.arange(scores.shape[1])
        return self._best(scores, packed, k).copy()

    def best_sums(
        self, first: Array, second: Array, columns: list[Array], num_second: int, k: int
    ) -> Array:
        """Return the k best sums of the given columns of both axes, packed, the best last."""
        # (-1 - i + 1) * B + (-1 - j) = -1 - (i * B + j)
        ids = self.ids(first)
        ids += 1
        ids *= num_second
        shape = (len(first), len(columns[0]))
        packed, more_packed = _shaped(self.packed, shape), _shaped(self.more_packed, shape)
        # Other modes than "clip" copy `out`.
        np.take(first, columns[0], axis=1, out=packed, mode="clip")
        np.take(second, columns[1], axis=1, out=more_packed, mode="clip")
        sums = _shaped(self.values, shape)
        np.add(self.scores(packed), self.scores(more_packed), out=sums)
        # Adds the ids: what becomes of the scores is overwritten.
        packed += more_packed
        return self._best(sums, packed, k)

    def _best(self, values: Array, packed: Array, k: int) -> Array:
        self._pack(values, packed)
        left_out = packed.shape[1] - k
        if left_out > 0:
            packed.partition(left_out, axis=1)
            packed = packed[:, left_out:]
        packed.sort(axis=1)
        self._unpack(packed)
        return packed

    @abstractmethod
    def ids(self, packed: Array) -> Array:
        """View what is packed below the scores: -1 - id."""

    @abstractmethod
    def scores(self, packed: Array) -> Array:
        """View the scores, unpacked."""

    @abstractmethod
    def _pack(self, values: Array, packed: Array) -> None: ...

    @abstractmethod
    def _unpack(self, packed: Array) -> None: ...


class _Float32Chunk(_Chunk):
    def __init__(self, numbers: int) -> None:
        super().__init__(numbers, np.float32, np.int64)
        self.bits, self.signs = (np.empty(numbers, np.int32) for _ in range(2))

    def ids(self, packed: Array) -> Array:
        return packed.view(HALVES)["id"]

    def scores(self, packed: Array) -> Array:
        return packed.view(HALVES)["score"].view(np.float32)

    def _pack(self, values: Array, packed: Array) -> None:
        # Integers in the order of the floats: the magnitude, negated where the sign bit is set.
        values = values.view(np.int32)
        bits, signs = (_shaped(scratch, values.shape) for scratch in (self.bits, self.signs))
        np.right_shift(values, 31, out=signs)
        np.bitwise_and(values, 0x7FFFFFFF, out=bits)
        bits ^= signs
        np.subtract(bits, signs, out=packed.view(HALVES)["score"])

    def _unpack(self, packed: Array) -> None:
        integers = packed.view(HALVES)["score"]
        bits, signs = (_shaped(scratch, integers.shape) for scratch in (self.bits, self.signs))
        np.abs(integers, out=bits)
        np.bitwise_and(integers, SIGN_BIT, out=signs)
        np.bitwise_or(bits, signs, out=integers)


class _Float64Chunk(_Chunk):
    def __init__(self, numbers: int) -> None:
        super().__init__(numbers, np.float64, np.complex128)

    def ids(self, packed: Array) -> Array:
        return packed.imag

    def scores(self, packed: Array) -> Array:
        return packed.real

    def _pack(self, values: Array, packed: Array) -> None:
        packed.real = values

    def _unpack(self, packed: Array) -> None:
        pass


def _shaped(flat: Array, shape: tuple[int, ...]) -> Array:
    return flat[: shape[0] * shape[1]].reshape(shape)

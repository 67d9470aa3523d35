"""The K best of all sums of two keys' scores on a CPU, by NumPy's vectorized partition.

T tokens, A and B keys of the two axes, N of either, C candidates: ranks (i, j) in both sorted axes.
t tokens of a chunk. Each score is packed above a number that falls as its id rises, so that no two
are equal and one comparison orders both: of equal scores, the one with the lowest id is the
largest. Score and number are the halves of an int64 for float32, the parts of a complex128 for
float64. The numbers of both axes sum to -1 - (i * B + j).
"""

from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# Of an int64 on a little-endian machine.
HALVES = np.dtype([("number", np.int32), ("score", np.int32)])
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
    (num_tokens, num_first), num_second = first_TA.shape, second_TB.shape[1]
    sums_TK = first_TA.new_empty(num_tokens, k)
    indices_TK = torch.empty(num_tokens, k, dtype=torch.int64, device="cpu")
    sums, indices = sums_TK.numpy(), indices_TK.numpy()
    chunk_type = _Float64Chunk if sums.dtype == np.float64 else _Float32Chunk
    axes = [
        _Axis(
            scores.numpy(), None if bias is None else bias.numpy(), chunk_type.with_numbers(numbers)
        )
        for scores, bias, numbers in (
            (first_TA, first_bias_A, -num_second * np.arange(1, num_first + 1)),
            (second_TB, second_bias_B, np.arange(num_second)[::-1]),
        )
    ]
    # Columns of the candidates: the best is last.
    columns = [
        min(k, size) - 1 - ranks
        for size, ranks in zip((num_first, num_second), ranks_2C.long().numpy(), strict=True)
    ]
    widest = max(num_first, num_second, ranks_2C.shape[1])
    step = max(1, min(CHUNK_NUMBERS // widest, num_tokens))
    # Claimed one by one: a thread that gets less of its core does fewer.
    unclaimed = deque(range(0, num_tokens, step))
    num_threads = min(torch.get_num_threads(), len(unclaimed))

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
                keys = [chunk.best_keys(axis, rows, k) for axis in axes]
                best = chunk.best_sums(keys, columns, k)[:, ::-1]
            sums[rows], indices[rows] = chunk.scores(best), chunk.numbers(best)
            # -1 - index becomes the index.
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


class _Axis(NamedTuple):
    """Scores (T, N), bias (N,), and numbers (N,) that fall as the id rises, packed."""

    scores: Array
    bias: Array | None
    numbers: Array


class _Chunk(ABC):
    """Scratch memory of a thread, used again for each chunk: new memory costs page faults."""

    dtype: npt.DTypeLike
    packed_dtype: npt.DTypeLike

    def __init__(self, size: int) -> None:
        self.values = np.empty(size, self.dtype)
        self.packed, self.more_packed = (np.empty(size, self.packed_dtype) for _ in range(2))

    @classmethod
    def with_numbers(cls, numbers: Array) -> Array:
        """Pack numbers below scores that are still to be written."""
        packed = np.zeros(len(numbers), cls.packed_dtype)
        cls.numbers(packed)[:] = numbers
        return packed

    def best_keys(self, axis: _Axis, rows: slice, k: int) -> Array:
        """Return the min(k, N) best of the scores and bias of an axis, packed, the best last."""
        scores = axis.scores[rows]
        if axis.bias is not None:
            scores = np.add(scores, axis.bias, out=_shaped(self.values, scores.shape))
        packed = _shaped(self.packed, scores.shape)
        packed[:] = axis.numbers
        return self._best(scores, packed, k).copy()

    def best_sums(self, keys: list[Array], columns: list[Array], k: int) -> Array:
        """Return the k best sums of the given columns of both axes, packed, the best last."""
        shape = (len(keys[0]), len(columns[0]))
        packed, more_packed = _shaped(self.packed, shape), _shaped(self.more_packed, shape)
        for one, chosen, out in zip(keys, columns, (packed, more_packed), strict=True):
            # Other modes than "clip" copy `out`.
            np.take(one, chosen, axis=1, out=out, mode="clip")
        sums = _shaped(self.values, shape)
        np.add(self.scores(packed), self.scores(more_packed), out=sums)
        # For the numbers; what becomes of the scores is overwritten.
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

    @staticmethod
    @abstractmethod
    def numbers(packed: Array) -> Array:
        """View the numbers below the scores."""

    @staticmethod
    @abstractmethod
    def scores(packed: Array) -> Array:
        """View the scores, unpacked."""

    @abstractmethod
    def _pack(self, values: Array, packed: Array) -> None: ...

    @abstractmethod
    def _unpack(self, packed: Array) -> None: ...


class _Float32Chunk(_Chunk):
    dtype, packed_dtype = np.float32, np.int64

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bits, self.signs = (np.empty(size, np.int32) for _ in range(2))

    @staticmethod
    def numbers(packed: Array) -> Array:
        return packed.view(HALVES)["number"]

    @staticmethod
    def scores(packed: Array) -> Array:
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
    dtype, packed_dtype = np.float64, np.complex128

    @staticmethod
    def numbers(packed: Array) -> Array:
        return packed.imag

    @staticmethod
    def scores(packed: Array) -> Array:
        return packed.real

    def _pack(self, values: Array, packed: Array) -> None:
        packed.real = values

    def _unpack(self, packed: Array) -> None:
        pass


def _shaped(flat: Array, shape: tuple[int, ...]) -> Array:
    return flat[: shape[0] * shape[1]].reshape(shape)

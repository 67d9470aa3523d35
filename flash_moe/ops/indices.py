"""Checks of expert ids and row offsets, and the sort of ids within each token.

On the CPU, wrong ids and offsets raise before any work. On CUDA, kernels turn an id out of range
into an empty slot, clamp offsets, and record what they found. The record is read without waiting
for the device: at the next call or backward pass of the op, or by `raise_index_errors`. With
FLASH_MOE_STRICT_INDICES=1 every call waits for its own record instead.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flash_moe.ops.backend_choice import MAX_SORTED_SLOTS
from flash_moe.ops.environment import switch
from flash_moe.ops.indices_kernels import (
    check_ids_kernel,
    check_offsets_kernel,
    sort_slots_kernel,
)
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2
from flash_moe.ops.tuning import Tuning

CHECK_BLOCK = 1024
NOTHING_FOUND = (2**63 - 1, 1 - 2**63, 0, -1)


@dataclass(frozen=True)
class IndicesConfig:
    """Choice of how the ids of a token are sorted.

    max_sorted_slots: tokens with more slots are sorted by torch.sort, not by a kernel.
    """

    max_sorted_slots: int = MAX_SORTED_SLOTS


tuning = Tuning(IndicesConfig())


def check_and_sort(
    indices_TK: Tensor, num_experts: int, in_kernels: bool, num_tokens_E: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Check ids and, in kernels, sort them within each token.

    Args:
        indices_TK: (T, K) int32 or int64.
        num_experts: E.
        in_kernels: check in Triton kernels, and sort.
        num_tokens_E: (E,) int32, to which the number of tokens that use each expert is added. Needs
            0 < K <= MAX_SORTED_SLOTS, T > 0, and in_kernels.

    Returns:
        ids (T*K,) int32 in [-1, E), and the position (T*K,) in `indices_TK` that each came from,
        in the dtype of `order_dtype`, or None if the order is unchanged.

    Raises:
        ValueError: an id is out of range; on CUDA, an id or offset of an earlier call was.
    """
    top_k = indices_TK.shape[1]
    if not in_kernels or indices_TK.numel() == 0:
        return _checked_ids(indices_TK.reshape(-1), num_experts, in_kernels), None
    if top_k > tuning.config.max_sorted_slots:
        ids_N = _checked_ids(indices_TK.reshape(-1), num_experts, in_kernels)
        ids_TK, slots_TK = ids_N.view(-1, top_k).sort(dim=1, stable=True)
        first_slot_T = torch.arange(len(ids_TK), device=ids_TK.device) * top_k
        order_TK = (slots_TK + first_slot_T.unsqueeze(1)).to(order_dtype(ids_N.numel()))
        return ids_TK.view(-1), order_TK.view(-1)
    record = _poll_and_get_record(indices_TK.device)
    ids_N = torch.empty(indices_TK.numel(), device=indices_TK.device, dtype=torch.int32)
    order_N = torch.empty(
        indices_TK.numel(), device=indices_TK.device, dtype=order_dtype(ids_N.numel())
    )
    block = next_power_of_2(top_k)
    narrow = (num_experts + 2) * block < 2**31
    launch(
        sort_slots_kernel,
        (indices_TK.shape[0],),
        indices_TK.contiguous(),
        ids_N,
        order_N,
        ids_N if num_tokens_E is None else num_tokens_E,
        record.found,
        record.flag,
        num_experts,
        TOP_K=top_k,
        BLOCK=block,
        KEY=triton.language.int32 if narrow else triton.language.int64,
        HAS_COUNTS=num_tokens_E is not None,
        num_warps=_sorting_warps(block),
    )
    record.after_launch()
    return ids_N, order_N


def _sorting_warps(block: int) -> int:
    # A single warp exchanges no keys with others, as long as it can hold them all.
    return 1 if block <= 1024 else block // 128


def order_dtype(num_pairs: int) -> torch.dtype:
    """The integer dtype that can index `num_pairs` pairs."""
    return torch.int32 if num_pairs < 2**31 else torch.int64


def check_ragged(
    row_offsets: Tensor, expert_ids_N: Tensor, num_experts: int, in_kernels: bool
) -> tuple[Tensor, Tensor]:
    """Check the row offsets and ids of a ragged pattern.

    Args:
        row_offsets: (T+1,) int32 or int64.
        expert_ids_N: (N,) int32 or int64.
        num_experts: E.
        in_kernels: check in Triton kernels.

    Returns:
        row offsets (T+1,) int64 in [0, N] and ids (N,) int32 in [-1, E).

    Raises:
        ValueError: an id is out of range, or the offsets do not ascend from 0 to N; on CUDA, an
            id or offset of an earlier call was wrong.
    """
    offsets = _checked_offsets(row_offsets, len(expert_ids_N), in_kernels)
    return offsets, _checked_ids(expert_ids_N, num_experts, in_kernels)


def raise_ids_out_of_range(ids: Tensor, num_experts: int) -> None:
    """Raise ValueError, at once, unless all ids lie in [-1, num_experts)."""
    if ids.numel() == 0:
        return
    least, greatest = (int(bound) for bound in ids.aminmax())
    if least < -1 or greatest >= num_experts:
        outside = ids[(ids < -1) | (ids >= num_experts)]
        raise ValueError(_id_message(int(outside.min()), int(outside.max()), num_experts))


def _checked_ids(ids_N: Tensor, num_experts: int, in_kernels: bool) -> Tensor:
    checked = torch.empty(ids_N.shape, device=ids_N.device, dtype=torch.int32)
    if ids_N.numel() == 0:
        return checked
    if not in_kernels:
        raise_ids_out_of_range(ids_N, num_experts)
        return checked.copy_(ids_N)
    record = _poll_and_get_record(ids_N.device)
    launch(
        check_ids_kernel,
        (cdiv(ids_N.numel(), CHECK_BLOCK),),
        ids_N.contiguous(),
        checked,
        record.found,
        record.flag,
        ids_N.numel(),
        num_experts,
        BLOCK=CHECK_BLOCK,
    )
    record.after_launch()
    return checked


def _checked_offsets(row_offsets: Tensor, num_pairs: int, in_kernels: bool) -> Tensor:
    num_rows = row_offsets.shape[0] - 1
    checked = torch.empty(num_rows + 1, device=row_offsets.device, dtype=torch.int64)
    if not in_kernels:
        ascending = bool((row_offsets.diff() >= 0).all())
        if not ascending or row_offsets[0] != 0 or row_offsets[-1] != num_pairs:
            raise ValueError(_offsets_message(num_pairs))
        return checked.copy_(row_offsets)
    record = _poll_and_get_record(row_offsets.device)
    launch(
        check_offsets_kernel,
        (cdiv(num_rows + 1, CHECK_BLOCK),),
        row_offsets.contiguous(),
        checked,
        record.found,
        record.flag,
        num_rows,
        num_pairs,
        BLOCK=CHECK_BLOCK,
    )
    record.after_launch()
    return checked


@dataclass(frozen=True)
class IndexErrorRecord:
    """What the checks on one device found: `found` and `flag` of `indices_kernels`."""

    found: Tensor
    flag: Tensor

    @classmethod
    def on(cls, device: torch.device) -> "IndexErrorRecord":
        # As ordinary tensors, since they outlive an inference mode that is on now.
        with torch.inference_mode(False):
            flag = torch.zeros(1, device="cpu", dtype=torch.int32)
            # The device writes to pinned host memory, where the host looks without a sync.
            flag = flag.pin_memory() if device.type == "cuda" else flag
            return cls(torch.tensor(NOTHING_FOUND, device=device), flag)

    def after_launch(self) -> None:
        """Poll at once where results are there already or FLASH_MOE_STRICT_INDICES=1."""
        strict = switch("FLASH_MOE_STRICT_INDICES", False)
        if self.found.is_cuda:
            if not strict:
                return
            torch.cuda.synchronize(self.found.device)
        self.poll()

    def poll(self) -> None:
        """Raise ValueError and reset the record if anything wrong has been found so far."""
        if self.flag.item() == 0:
            return
        if self.found.is_cuda:
            torch.cuda.synchronize(self.found.device)
        least, greatest, num_experts, num_pairs = self.found.tolist()
        self.found.copy_(torch.tensor(NOTHING_FOUND, device="cpu"))
        self.flag.zero_()
        if num_pairs >= 0:
            raise ValueError(_offsets_message(num_pairs))
        raise ValueError(_id_message(least, greatest, num_experts))


_records: dict[torch.device, IndexErrorRecord] = {}


def raise_index_errors() -> None:
    """Wait for all CUDA devices in use and raise ValueError if ids or offsets were wrong."""
    for device, record in list(_records.items()):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        record.poll()


def poll_index_errors(device: torch.device) -> None:
    """Raise ValueError if work already done on `device` found wrong ids; does not wait for it."""
    if device in _records:
        _records[device].poll()


def _id_message(least: int, greatest: int, num_experts: int) -> str:
    return (
        f"indices must lie in [-1, {num_experts}), where -1 marks an empty slot, "
        f"but ids from {least} to {greatest} were found"
    )


def _offsets_message(num_pairs: int) -> str:
    return f"row_offsets must ascend from 0 to the number of pairs = {num_pairs}, but do not"


def _poll_and_get_record(device: torch.device) -> IndexErrorRecord:
    if device not in _records:
        _records[device] = IndexErrorRecord.on(device)
    _records[device].poll()
    return _records[device]

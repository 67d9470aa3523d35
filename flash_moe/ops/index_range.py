"""Expert ids out of range: never followed into memory, always reported.

On the CPU the ids are looked at before any work. On CUDA a kernel turns an id out of range
into an empty slot and records it; the record is read without waiting for the device, at the
next call or backward pass of the op or by `raise_index_errors`. With
FLASH_MOE_STRICT_INDICES=1 every call waits for its own record instead.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

CHECK_BLOCK = 1024
NOTHING_FOUND = [2**63 - 1, 1 - 2**63, 0]


@dataclass(frozen=True)
class _Record:
    """What the kernels of one device found.

    `found` (3,) on the device: least and greatest id out of range, and the number of experts;
    `flag` (1,) in host memory that the device can write to.
    """

    found: Tensor
    flag: Tensor

    @classmethod
    def on(cls, device: torch.device) -> "_Record":
        found = torch.tensor(NOTHING_FOUND, device=device)
        return cls(found, torch.zeros(1, dtype=torch.int32).pin_memory())


_records: dict[torch.device, _Record] = {}


def checked_expert_ids(ids: Tensor, num_experts: int) -> Tensor:
    """A copy of `ids` as int32 in [-1, num_experts).

    Raises:
        ValueError: an id is out of range; on CUDA, an id of an earlier call was.
    """
    if ids.is_cuda:
        return _checked_on_device(ids, num_experts)
    if ids.numel() > 0:
        least, greatest = (int(bound) for bound in ids.aminmax())
        if least < -1 or greatest >= num_experts:
            raise ValueError(_message(least, greatest, num_experts))
    return ids.to(torch.int32, copy=True)


def raise_index_errors() -> None:
    """Wait for all CUDA devices in use and raise ValueError if ids were out of range."""
    for device in list(_records):
        torch.cuda.synchronize(device)
        poll_index_errors(device)


def poll_index_errors(device: torch.device) -> None:
    """Raise ValueError if work already done on `device` found ids out of range; no waiting."""
    record = _records.get(device)
    if record is None or record.flag.item() == 0:
        return
    torch.cuda.synchronize(device)
    least, greatest, num_experts = record.found.tolist()
    record.found.copy_(torch.tensor(NOTHING_FOUND))
    record.flag.zero_()
    raise ValueError(_message(least, greatest, num_experts))


def _checked_on_device(ids: Tensor, num_experts: int) -> Tensor:
    import triton

    from flash_moe.ops.backends.gather import on_device
    from flash_moe.ops.backends.gather_kernels import check_ids_kernel

    poll_index_errors(ids.device)
    if ids.device not in _records:
        _records[ids.device] = _Record.on(ids.device)
    record = _records[ids.device]
    checked = torch.empty(ids.shape, device=ids.device, dtype=torch.int32)
    if ids.numel() == 0:
        return checked
    with on_device(ids):
        check_ids_kernel[(triton.cdiv(ids.numel(), CHECK_BLOCK),)](
            ids.contiguous(),
            checked,
            record.found,
            record.flag,
            ids.numel(),
            num_experts,
            BLOCK=CHECK_BLOCK,
        )
    if os.environ.get("FLASH_MOE_STRICT_INDICES") == "1":
        torch.cuda.synchronize(ids.device)
        poll_index_errors(ids.device)
    return checked


def _message(least: int, greatest: int, num_experts: int) -> str:
    return (
        f"indices must lie in [-1, {num_experts}), where -1 marks an empty slot, "
        f"but ids from {least} to {greatest} were found"
    )

"""Whole tensors of a sharded model in one safetensors file, for use outside, and back.

Format: https://github.com/huggingface/safetensors, 8 bytes of header length, a JSON header, then
the tensors in row-major order. Ranks write and read their own parts in pieces of rows, so that
none holds more of a tensor than its shard and one piece; safetensors' own writer takes whole
tensors, and the one of torch.distributed.checkpoint a second copy of every shard.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flash_moe_dist.agreement import same_error_on_all_ranks
from flash_moe_dist.checkpoint import check_same_tensors

PIECE_BYTES = 2**26
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def export_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors, `model.state_dict()` say, into one safetensors file; collective.

    Ranks write in turn, into a file of another name that gets its own when it is complete. All
    must see the same file system.

    Args:
        tensors: DTensors on any meshes, and plain tensors, taken from the first rank.

    Raises:
        TypeError: on every rank, for a dtype that the format or this function does not know.
        RuntimeError: on every rank, if the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with same_error_on_all_ranks():
            header, places = _layout(tensors)
            if dist.get_rank() == 0:
                whole = sum(one.numel() * one.itemsize for one in tensors.values())
                with partial.open("wb") as file:
                    file.write(header)
                    file.flush()
                    # Writing to a map of a file that finds no space would kill the process.
                    os.posix_fallocate(file.fileno(), 0, len(header) + whole)
        # In turn: two machines that write parts of one page of a shared file may lose one.
        for rank in range(dist.get_world_size()):
            with same_error_on_all_ranks():
                if rank == dist.get_rank():
                    for name, tensor in tensors.items():
                        _write(partial, len(header) + places[name], tensor)
        with same_error_on_all_ranks():
            if dist.get_rank() == 0:
                partial.rename(path)
    except (TypeError, ValueError, RuntimeError):
        if dist.get_rank() == 0:
            partial.unlink(missing_ok=True)
        raise


@torch.no_grad()
def import_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place from a safetensors file of whole ones; collective.

    Args:
        tensors: as `export_tensors`; each rank reads its own part.

    Raises:
        ValueError: on every rank, if the file is missing or damaged, or its tensors differ from
            `tensors` in name, shape or dtype. Nothing has been changed then.
    """
    with same_error_on_all_ranks():
        try:
            with safe_open(path, framework="pt") as file:
                _check_same(file, tensors, path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    with same_error_on_all_ranks():
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
                continue
            local, offset = _own_part(tensor)
            if local.ndim == 0:
                with safe_open(path, framework="pt") as file:
                    local.copy_(file.get_tensor(name))
                continue
            for first, last in _pieces(local, tensor):
                place = (slice(offset[0] + first, offset[0] + last), *_columns(local, offset))
                # Opened anew, as what it has mapped counts as this process's memory.
                with safe_open(path, framework="pt") as file:
                    local[first:last].copy_(file.get_slice(name)[place])


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header, its length included, and where each tensor begins after it."""
    entries: dict[str, Any] = {}
    places: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise TypeError(f"{name} must have one of the dtypes {known}, got {tensor.dtype}")
        places[name] = end
        end += tensor.numel() * tensor.itemsize
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [places[name], end],
        }
    text = json.dumps(entries).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places


def _write(path: Path, place: int, tensor: Tensor) -> None:
    if not _writes(tensor):
        return
    local, offset = _own_part(tensor)
    if local.numel() == 0:
        return
    if local.ndim == 0:
        local, offset = local.view(1), (0,)
    # Bytes of an element as one more dimension: numpy knows no bfloat16.
    row_shape = (*tensor.shape[1:], local.itemsize)
    for first, last in _pieces(local, tensor):
        begin = place + (offset[0] + first) * math.prod(row_shape)
        # Whatever is mapped counts as this process's memory, so a piece at a time.
        rows = np.memmap(path, np.uint8, "r+", begin, (last - first, *row_shape))
        own = local[first:last].detach().cpu().contiguous()
        # view(dtype) scales the last dimension, and a 0 there has nothing to scale.
        own_bytes = own.view(-1).view(torch.uint8).view(*own.shape, -1)
        columns = (slice(None), *_columns(local, offset))
        rows[columns] = own_bytes.numpy()
        rows.flush()


def _columns(local: Tensor, offset: tuple[int, ...]) -> list[slice]:
    """Where a shard is in rows of the whole."""
    rest = zip(offset[1:], local.shape[1:], strict=True)
    return [slice(begin, begin + size) for begin, size in rest]


def _own_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's shard, and where in the whole it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), tuple(offset)


def _writes(tensor: Tensor) -> bool:
    """Whether this rank is the one of those with the same part that writes it."""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    places = zip(coordinate, tensor.placements, strict=True)
    return all(at == 0 for at, placement in places if placement.is_replicate())


def _pieces(local: Tensor, tensor: Tensor) -> list[tuple[int, int]]:
    """Runs of a shard's rows that take up to PIECE_BYTES in the whole."""
    rows = local.shape[0]
    row_bytes = max(1, math.prod(tensor.shape[1:]) * local.itemsize)
    step = max(1, PIECE_BYTES // row_bytes)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _check_same(file: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    saved = {
        name: (list(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype())
        for name in file.keys()  # noqa: SIM118
    }
    here = {name: (list(one.shape), DTYPES.get(one.dtype)) for name, one in tensors.items()}
    check_same_tensors(saved, here, path, "model")

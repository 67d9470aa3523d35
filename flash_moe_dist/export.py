"""Export of a sharded model's tensors to one safetensors file, and import from such a file.

Format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header, then
the tensors in row-major order. Each rank writes and reads its own shard in pieces, runs of rows
of at most PIECE_BYTES, and needs no memory beyond its shard and one piece. That is why this does
not use safetensors' writer, which takes unsharded tensors, or that of
torch.distributed.checkpoint, which makes a second copy of every shard.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flash_moe.arguments import checked_path
from flash_moe_dist.agreement import rank_and_size, same_error_on_all_ranks
from flash_moe_dist.same_tensors import check_same_tensors

try:
    import numpy as np
    from safetensors import SafetensorError, safe_open
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"flash_moe_dist.export needs {error.name}: pip install flash-moe[export]", name=error.name
    ) from error

PIECE_BYTES = 2**26
METADATA = "__metadata__"
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


def export_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write unsharded tensors, such as `model.state_dict()`, to one safetensors file; collective.

    Ranks write in turn to `path`.partial, which is renamed once it is complete. All ranks must see
    the same file system. A process without a process group is taken for the only rank.

    Args:
        path: file to write; an existing one is replaced.
        tensors: DTensors on any meshes, and plain tensors, whose values on rank 0 are written.

    Raises:
        TypeError: on every rank, if `path` is no path, a name is no str, a value is no dense
            tensor, as extra state of modules may be, or a dtype is not one of DTYPES.
        ValueError: on every rank, if a tensor is on the meta device, or has the name
            "__metadata__", which the format keeps for {"format": "pt"}.
        RuntimeError: on every rank, if the file cannot be written; an existing one is unchanged.
    """
    rank, world_size = rank_and_size()
    with same_error_on_all_ranks():
        path = checked_path("path", path)
        partial = path.with_name(path.name + ".partial")
        header, begins = _layout(tensors)
    try:
        with same_error_on_all_ranks():
            if rank == 0:
                tensor_bytes = sum(one.numel() * one.itemsize for one in tensors.values())
                # Removed first, as it may be a link, which would be followed.
                partial.unlink(missing_ok=True)
                with partial.open("xb") as file:
                    file.write(header)
                    file.flush()
                    # A full disk must raise an error here: in a write to a memory map it would
                    # kill the process.
                    os.posix_fallocate(file.fileno(), 0, len(header) + tensor_bytes)
        # In turn: when two machines write to the same page of a shared file, one may be lost.
        for writing in range(world_size):
            with same_error_on_all_ranks():
                if writing == rank:
                    for name, tensor in tensors.items():
                        _write(partial, len(header) + begins[name], tensor)
        with same_error_on_all_ranks():
            if rank == 0:
                partial.rename(path)
    except (TypeError, ValueError, RuntimeError):
        if rank == 0:
            partial.unlink(missing_ok=True)
        raise


@torch.no_grad()
def import_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place from a safetensors file of unsharded tensors; collective.

    Args:
        path: file to read, which all ranks must see.
        tensors: tensors by name, see `export_tensors`; each rank reads its own shard.

    Raises:
        TypeError: on every rank, if `path` is no path, a name is no str, or a value is no dense
            tensor.
        ValueError: on every rank, if a tensor is on the meta device, the file is missing or
            damaged, or its tensors differ from `tensors` in name, shape or dtype. `tensors` are
            then unchanged.
    """
    with same_error_on_all_ranks():
        path = checked_path("path", path)
        _check_tensors(tensors)
        try:
            with safe_open(path, framework="pt") as file:
                _check_same(file, tensors, path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    # safetensors would allocate what it reads on the default device.
    with same_error_on_all_ranks(), torch.device("cpu"):
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
                continue
            local, offset = _local_shard(tensor)
            if local.numel() == 0:
                continue
            if local.ndim == 0:
                with safe_open(path, framework="pt") as file:
                    local.copy_(file.get_tensor(name))
                continue
            for first, last in _pieces(local, tensor):
                index = (slice(offset[0] + first, offset[0] + last), *_columns(local, offset))
                # Reopened for each piece: pages stay mapped, and count as this process's memory,
                # until the file is closed.
                with safe_open(path, framework="pt") as file:
                    local[first:last].copy_(file.get_slice(name)[index])


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise an error unless `tensors` maps names that a file can have to tensors."""
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must map names to tensors, got a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"names of tensors must be strings, got {name!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got a {type(tensor).__name__}: leave it out, "
                "a safetensors file holds nothing else"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.is_meta:
            raise ValueError(
                f"{name} must have memory, got a tensor on the meta device: see "
                "flash_moe_dist.materialize"
            )
        if name == METADATA:
            raise ValueError(f"a tensor must have another name than {METADATA}")


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return the header, including its length, and the byte offset of each tensor after it."""
    _check_tensors(tensors)
    # Names the library whose tensors these are, as readers expect.
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise TypeError(f"{name} must have one of the dtypes {known}, got {tensor.dtype}")
        begins[name] = end
        end += tensor.numel() * tensor.itemsize
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(entries).encode()
    # Pad, so that the tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, begins


def _write(path: Path, tensor_begin: int, tensor: Tensor) -> None:
    """Write this rank's shard of a tensor that begins at byte `tensor_begin` of the file."""
    if not _writes(tensor):
        return
    local, offset = _local_shard(tensor)
    if local.numel() == 0:
        return
    if local.ndim == 0:
        local, offset = local.view(1), (0,)
    # The bytes of an element are one more dimension, because numpy has no bfloat16.
    row_shape = (*tensor.shape[1:], local.itemsize)
    for first, last in _pieces(local, tensor):
        begin = tensor_begin + (offset[0] + first) * math.prod(row_shape)
        # A piece at a time, because mapped pages count as this process's memory.
        rows = np.memmap(path, np.uint8, "r+", begin, (last - first, *row_shape))
        own = local[first:last].detach().cpu().contiguous()
        # Flattened first: view(dtype) needs a stride of 1 in the last dimension.
        own_bytes = own.view(-1).view(torch.uint8).view(*own.shape, -1)
        columns = (slice(None), *_columns(local, offset))
        rows[columns] = own_bytes.numpy()
        rows.flush()


def _columns(local: Tensor, offset: tuple[int, ...]) -> list[slice]:
    """Slices, of all dimensions but the first, that a shard covers in the unsharded tensor."""
    rest = zip(offset[1:], local.shape[1:], strict=True)
    return [slice(begin, begin + size) for begin, size in rest]


def _local_shard(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's shard and the index of its first element in the unsharded tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), tuple(offset)


def _writes(tensor: Tensor) -> bool:
    """Whether this rank writes its shard: of the ranks with equal shards, exactly one does."""
    if not isinstance(tensor, DTensor):
        return rank_and_size().rank == 0
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    along_mesh = zip(coordinate, tensor.placements, strict=True)
    return all(at == 0 for at, placement in along_mesh if placement.is_replicate())


def _pieces(local: Tensor, tensor: Tensor) -> list[tuple[int, int]]:
    """Split a shard into (first, last) rows that take up at most PIECE_BYTES when unsharded."""
    rows = local.shape[0]
    row_bytes = max(1, math.prod(tensor.shape[1:]) * local.itemsize)
    piece_rows = max(1, PIECE_BYTES // row_bytes)
    return [(first, min(first + piece_rows, rows)) for first in range(0, rows, piece_rows)]


def _check_same(file: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    saved = {
        name: (list(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype())
        for name in file.keys()  # noqa: SIM118
    }
    here = {name: (list(one.shape), DTYPES.get(one.dtype)) for name, one in tensors.items()}
    check_same_tensors(saved, here, path, "model")

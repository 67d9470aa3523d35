"""Reading of a checkpoint's pickles such that no code of its author runs.

torch.distributed.checkpoint pickles two things: `.metadata`, which it reads without restriction,
and each entry of the state that is no tensor, which it reads with `torch.load(weights_only=False)`.
Here the globals that `.metadata` may name are replaced by inert records, from which the metadata
is built, and entries are read with `weights_only=True`.
"""

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType

# Module and name of each global that torch.distributed.checkpoint writes into `.metadata`, besides
# dtypes and torch.Size.
RECORDS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    # The folder that the checkpoint was saved to; the second module is that of Python 3.13.
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}
ADVICE = (
    "entries may consist of tensors, numbers, text, lists, tuples, dicts, and classes that "
    "torch.serialization.add_safe_globals has been told before saving and loading"
)


class UnsafeError(ValueError):
    """A checkpoint asks for something that loading it does not need."""


class _Record:
    """Stands for an object of a pickle: keeps arguments and state, and does nothing."""

    kind = ""
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECORDS:
            # A new class each time, because a pickle can set attributes of a class.
            return type(name, (_Record,), {"kind": name})
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise UnsafeError(f".metadata refers to {module}.{name}, which no checkpoint needs")


def parse_metadata(content: bytes) -> Metadata:
    """Unpickle the content of `.metadata` without running anything that it names.

    Raises:
        UnsafeError: it refers to a global that no checkpoint needs, or to a file that is not
            directly in the checkpoint's folder.
        ValueError: it is not the metadata of a checkpoint.
        Exception: nearly any other, if it has been truncated or altered.
    """
    fields = _fields(_MetadataUnpickler(io.BytesIO(content)).load(), "Metadata")
    described = {
        str(name): _description(one) for name, one in fields["state_dict_metadata"].items()
    }
    paths = fields.get("planner_data") or {}
    return Metadata(
        described,
        planner_data={name: _keys(paths.get(name, (name,)), len(described)) for name in described},
        storage_data={_index(key): _place(one) for key, one in fields["storage_data"].items()},
        storage_meta=StorageMeta(),
        version=fields.get("version"),
    )


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if getattr(record, "kind", None) != kind or not isinstance(record.state, dict):
        _refuse(record, kind)
    return record.state


def _description(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if getattr(record, "kind", None) == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    properties = fields["properties"]
    if getattr(properties, "kind", None) != "TensorProperties":
        _refuse(properties, "TensorProperties")
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        _refuse(dtype, "dtype")
    chunks = [_fields(one, "ChunkStorageMetadata") for one in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(one["offsets"]), _size(one["sizes"])) for one in chunks],
    )


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset, hint = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        str(fields["fqn"]),
        None if offset is None else _size(offset),
        None if hint is None else _count(hint),
    )


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    name = str(fields["relative_path"])
    if Path(name).name != name or name == "..":
        raise UnsafeError(f".metadata refers to the file {name}, which is not in the folder")
    return _StorageInfo(
        name,
        _count(fields["offset"]),
        _count(fields["length"]),
        fields.get("transform_descriptors"),
    )


def _keys(keys: Any, limit: int) -> tuple[str | int, ...]:
    """Keys that lead to an entry in nested dicts and lists, the latter no longer than `limit`."""
    if not isinstance(keys, tuple):
        _refuse(keys, "tuple")
    for key in keys:
        if not isinstance(key, str) and not _count(key) < limit:
            raise ValueError(f".metadata has an index of {key} for {limit} entries")
    return keys


def _size(numbers: Any) -> torch.Size:
    return torch.Size([_count(one) for one in numbers])


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        _refuse(number, "number")
    return number


def _refuse(found: object, expected: str) -> NoReturn:
    raise ValueError(f".metadata has a {type(found).__name__} in place of a {expected}")


def check_objects(path: Path, metadata: Metadata, names: Iterable[str]) -> None:
    """Read the entries in some of a checkpoint's files that are no tensors, and drop them.

    Args:
        path: folder of the checkpoint.
        names: files to look into.

    Raises:
        UnsafeError: an entry needs more than `torch.load(weights_only=True)` admits.
    """
    of_file: dict[str, list[tuple[str, _StorageInfo]]] = {name: [] for name in names}
    for index, place in metadata.storage_data.items():
        described = metadata.state_dict_metadata.get(index.fqn)
        if isinstance(described, BytesStorageMetadata) and place.relative_path in of_file:
            of_file[place.relative_path].append((index.fqn, place))
    for name, entries in of_file.items():
        with (path / name).open("rb") as file:
            for entry, place in entries:
                file.seek(place.offset)
                _load_entry(entry, io.BytesIO(file.read(place.length)))


def _load_entry(name: str, content: io.BytesIO) -> Any:
    try:
        return torch.load(content, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        raise UnsafeError(f"{name} is not read: {reason.strip()}; {ADVICE}") from error


class SafeReader(FileSystemReader):
    """Reads the files of a checkpoint whose metadata has already been read."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """Loads entries that are no tensors with `weights_only=True`.

    `has_begun` tells whether anything has been loaded into the state.
    """

    has_begun = False

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded = _load_entry(name, value)
        self.has_begun = True
        set_element(self.original_state_dict, self.mappings[name], loaded)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        self.has_begun = True
        return super().resolve_tensor(read_item)


class SafeSavePlanner(DefaultSavePlanner):
    """Refuses to save an entry that SafeLoadPlanner could not load."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        pickled = super().transform_object(write_item, object)
        if write_item.type == WriteItemType.BYTE_IO:
            pickled.seek(0)
            _load_entry(write_item.index.fqn, pickled)
        return pickled

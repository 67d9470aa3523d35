"""Checks that a checkpoint is whole, as it was saved, and safe to load.

A checkpoint that is not is a ValueError that says which of these it is, and of which file.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint.metadata import Metadata

from flash_moe_dist.checkpoint_manifest import (
    MANIFEST,
    AlteredError,
    check_sum,
    chunks_of,
    parse_manifest,
)
from flash_moe_dist.checkpoint_unpickling import UnsafeError, check_objects, parse_metadata

METADATA, PROGRESS = ".metadata", "progress.json"


class CompleteCheckpoint(NamedTuple):
    """What a checkpoint consists of.

    sizes: bytes of each data file, by name.
    sums: SHA-256 sums of its files, by name; None if it has none.
    """

    metadata: Metadata
    sizes: dict[str, int]
    sums: dict[str, str] | None


def read_complete(path: Path) -> CompleteCheckpoint:
    """Read the metadata; raise ValueError unless every file has all the bytes it refers to."""
    with _explained(path):
        sums = _read_sums(path)
        content = _file_in(path, METADATA).read_bytes()
        if sums is not None:
            check_sum(METADATA, [content], sums)
        metadata = parse_metadata(content)
        ends: dict[str, int] = {}
        for place in metadata.storage_data.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        sizes = {name: _file_in(path, name).stat().st_size for name in ends}
        short = sorted(
            f"{name} ({sizes[name]} bytes)" for name in sizes if sizes[name] < ends[name]
        )
        if short:
            raise ValueError(f"truncated files: {', '.join(short)}")
    sizes.pop(MANIFEST, None)
    return CompleteCheckpoint(metadata, sizes, sums)


def read_progress(path: Path, step: int) -> dict[str, Any]:
    """Read PROGRESS; raise ValueError unless it is as it was saved, and of that step."""
    with _explained(path):
        content, sums = _file_in(path, PROGRESS).read_bytes(), _read_sums(path)
        if sums is not None:
            check_sum(PROGRESS, [content], sums)
        try:
            read = json.loads(content)
        except ValueError as error:
            raise AlteredError(f"{PROGRESS} is not JSON: {error}") from error
    if not isinstance(read, dict) or read.get("step") != step:
        raise ValueError(f"{path / PROGRESS} must contain step {step}, got {read}")
    return read


def _read_sums(path: Path) -> dict[str, str] | None:
    """Sums in the checkpoint's MANIFEST; None if it has none."""
    if not os.path.lexists(path / MANIFEST):
        return None
    return parse_manifest(_file_in(path, MANIFEST).read_bytes())


def check_data(
    path: Path, metadata: Metadata, names: list[str], sums: Mapping[str, str] | None
) -> None:
    """Raise ValueError if data files of a checkpoint have been altered or are not safe to load."""
    with _explained(path):
        for name in names:
            if sums is not None:
                check_sum(name, chunks_of(path / name), sums)
        check_objects(path, metadata, names)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn any error while a checkpoint is read into a ValueError that says what is wrong."""
    try:
        yield
    except UnsafeError as error:
        raise ValueError(f"{path} is not safe to load: {error}") from error
    except AlteredError as error:
        raise ValueError(f"{path} is a damaged checkpoint: {error}") from error
    except NotADirectoryError as error:
        raise ValueError(f"{path} is no checkpoint: it is not a folder") from error
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ValueError(f"{path} is an incomplete checkpoint: it has no file {missing}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    # A truncated pickle can raise nearly anything.
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path} is an incomplete checkpoint: {kind}{error}") from error


def _file_in(path: Path, name: str) -> Path:
    """Path of a file of a checkpoint.

    Raises:
        UnsafeError: it is a link to elsewhere.
        AlteredError: it is no regular file.
    """
    try:
        found = (path / name).resolve(strict=True)
    except FileNotFoundError as error:
        # Not where a link leads.
        error.filename = str(path / name)
        raise
    if not found.is_relative_to(path.resolve()):
        raise UnsafeError(f"{name} is not a file in the folder, but {found}")
    if not found.is_file():
        kind = "a folder" if found.is_dir() else "a device, pipe or socket"
        raise AlteredError(f"{name} is {kind} in place of a file")
    return found

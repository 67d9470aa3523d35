"""SHA-256 sums of a checkpoint's files, taken while they are written and compared before loading.

step-00000200/SHA256SUMS   a line "sum  name" for each other file; `sha256sum -c` checks it too
"""

import hashlib
import io
import re
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from os import PathLike, fsync
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

MANIFEST = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
READ_BYTES = 2**22
# Fewer are hashed sooner than a thread is woken.
MIN_BYTES_FOR_THREAD = 2**18


class AlteredError(ValueError):
    """A file is not the one that was saved."""


class HashingWriter(FileSystemWriter):
    """Writes a checkpoint as FileSystemWriter does, and hashes the bytes on their way to the disk.

    Each rank sends the sums of its files with its results to rank 0, which writes MANIFEST last.
    A file or link that already has the name of one to be written is an error.

    Args:
        path: folder of the checkpoint.
        small_files: content of further files, by name, which rank 0 writes.
    """

    def __init__(self, path: Path, small_files: Mapping[str, bytes]) -> None:
        super().__init__(path)
        self.fs = self._files = _HashingFileSystem()
        self._small_files = small_files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        hashed: Future[list[WriteResult]] = Future()
        hashed.set_result([self._with_sum(one) for one in results])
        return hashed

    def _with_sum(self, result: WriteResult) -> "_HashedResult":
        known = {field.name: getattr(result, field.name) for field in fields(result)}
        return _HashedResult(**known, sha256=self._files.sums[result.storage_data.relative_path])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        hashed = cast(list[list[_HashedResult]], results)
        sums = {one.storage_data.relative_path: one.sha256 for of_rank in hashed for one in of_rank}
        # Named in the metadata, so that a checkpoint that has lost it is not taken for an older
        # one, which had none.
        listed = WriteResult(MetadataIndex(MANIFEST), 0, _StorageInfo(MANIFEST, 0, 0))
        super().finish(metadata, [*results, [listed]])
        for name, content in self._small_files.items():
            self._write(name, content)
        sums |= self._files.sums
        self._write(MANIFEST, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())

    def _write(self, name: str, content: bytes) -> None:
        with self._files.create_stream(Path(self.path) / name, "wb") as file:
            file.write(content)
            file.flush()
            fsync(file.fileno())


@dataclass(frozen=True)
class _HashedResult(WriteResult):
    """What was written of one entry, and the sum of the file that holds it."""

    sha256: str


class _HashingFileSystem(FileSystem):
    """Files of one rank; `sums` has the SHA-256 sum of each that was written, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextmanager
    def create_stream(
        self, path: str | PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        # Created anew, because opening an existing link would write to what it points to.
        with Path(path).open(mode.replace("w", "x")) as file, ThreadPoolExecutor(1) as thread:
            stream = _HashingStream(cast(IO[bytes], file), thread)
            yield cast(io.IOBase, stream)
        self.sums[Path(path).name] = stream.sha256.hexdigest()

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _HashingStream:
    """A file whose bytes are hashed while they are written, large pieces by a thread."""

    def __init__(self, file: IO[bytes], thread: ThreadPoolExecutor) -> None:
        self.sha256 = hashlib.sha256()
        self._file, self._thread = file, thread

    def write(self, data: Any) -> int:
        if memoryview(data).nbytes < MIN_BYTES_FOR_THREAD:
            self.sha256.update(data)
            return self._file.write(data)
        hashing = self._thread.submit(self.sha256.update, data)
        try:
            return self._file.write(data)
        finally:
            # The caller may free `data` as soon as this returns.
            hashing.result()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def parse_manifest(text: bytes) -> dict[str, str]:
    """Read the content of a MANIFEST; returns the sums by file name.

    Raises:
        AlteredError: a line is not a sum and a name.
    """
    matches = [LINE.fullmatch(line) for line in text.decode("ascii", "replace").splitlines()]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) < len(matches):
        raise AlteredError(f"{MANIFEST} has lines other than a sum and a name")
    return sums


def check_sum(name: str, chunks: Iterable[bytes | memoryview], sums: Mapping[str, str]) -> None:
    """Compare the SHA-256 sum of a file's content, given in chunks, with that in `sums`.

    Raises:
        AlteredError: the sums differ, or `sums` has none for `name`.
    """
    sha256 = hashlib.sha256()
    for chunk in chunks:
        sha256.update(chunk)
    if sums.get(name) != sha256.hexdigest():
        raise AlteredError(
            f"{name} has SHA-256 sum {sha256.hexdigest()}, but {MANIFEST} says "
            f"{sums.get(name, 'nothing')}"
        )


def chunks_of(path: Path) -> Generator[memoryview, None, None]:
    """Read a file into one buffer of READ_BYTES, again and again; yields what is in it."""
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def share_of_rank(sizes: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """Divide files over ranks, the largest first, each to the rank with the fewest bytes so far.

    Args:
        sizes: bytes by file name, the same on all ranks.

    Returns:
        The names of the files of `rank`.
    """
    totals, own = [0] * world_size, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        chosen = totals.index(min(totals))
        totals[chosen] += sizes[name]
        if chosen == rank:
            own.append(name)
    return own

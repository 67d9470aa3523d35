"""Sharded checkpoints through torch.distributed.checkpoint, one folder for each saved step.

    folder/step-00000200/           complete: .metadata, *.distcp, progress.json, SHA256SUMS
    folder/step-00000300.partial/   being written, or left by a run that was killed while writing
    folder/step-00000100.removed/   being removed, or left by a run that was killed while removing

A checkpoint is written under a name ending in .partial and renamed once it is complete, so every
folder named step-N can be loaded, on any number of ranks and any meshes. Before anything is loaded,
all files are compared with SHA256SUMS, and nothing that they name is run (`checkpoint_unpickling`).
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from flash_moe_dist.agreement import (
    gather_objects,
    place_in_world,
    raise_same_error,
    same_error_on_all_ranks,
)
from flash_moe_dist.checkpoint_manifest import (
    MANIFEST,
    AlteredError,
    HashingWriter,
    check_sum,
    chunks_of,
    parse_manifest,
    share_of_rank,
)
from flash_moe_dist.checkpoint_unpickling import (
    SafeLoadPlanner,
    SafeReader,
    SafeSavePlanner,
    UnsafeError,
    check_objects,
    parse_metadata,
)
from flash_moe_dist.optimizer_state import SavedOptimizer, optimizer_state
from flash_moe_dist.runtime import DEFAULT_TIMEOUT

# How keys of a state dict end that hold what nn.Module.get_extra_state gave.
EXTRA_STATE = "_extra_state"
METADATA, PROGRESS = ".metadata", "progress.json"
COMPLETE = re.compile(r"step-(\d{8,})")
# Suffixes of folders being written and being removed.
UNFINISHED = (".partial", ".removed")


class PartialLoadError(RuntimeError):
    """Loading failed when some tensors of the model had been overwritten on some rank."""


class Checkpointer:
    """Saves and loads the model, optimizer, random number generators and progress of a run.

    The constructor and all methods are collective over all ranks, which must see the same folder.
    A process without a process group is taken for the only rank.

    Args:
        folder: parent of the checkpoints' folders; created by the first `save`.
        keep: number of checkpoints to keep; the oldest are removed once a newer one is complete.
        asynchronous: `save` returns once it has copied the state, and a thread writes the copy.
        timeout: how long ranks wait for each other while saving and loading.

    Raises:
        ValueError: on every rank, if `keep` is less than 1.
        TypeError: on every rank, if `folder` is no path.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int = 2,
        asynchronous: bool = False,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        # A separate group, so that a thread can save while the ranks train.
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        with same_error_on_all_ranks(self._group):
            if keep < 1:
                raise ValueError(f"keep must be at least 1, got {keep}")
            self.folder, self.keep = Path(folder), keep
        place = place_in_world()
        self._rank, self._world_size = place.rank, place.world_size
        self._is_first = self._rank == 0
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Write all that training needs to continue after `step`, each rank its own shards.

        Waits for the previous save to finish. Extra state (`nn.Module.get_extra_state`) and other
        objects are those of rank 0.

        Args:
            step: number of training steps done, 0 or more; must not have been saved yet.
            progress: values to store with it by name, serializable as JSON, the same on all ranks;
                without "step", which is added.

        Raises:
            ValueError: on every rank, if `step` is negative or has already been saved, `progress`
                has "step", or the optimizer has a parameter that is not one of the model.
            TypeError: on every rank, if `step` is no int, `progress` cannot be serialized, or a
                dict in the optimizer has a key that is no str.
            RuntimeError: on every rank, if this checkpoint or the previous one cannot be written,
                or the state holds an object that `load` would not admit. Complete checkpoints are
                left unchanged.
        """
        self.wait()
        with same_error_on_all_ranks(self._group):
            complete = self._path(step)
            partial = complete.with_name(complete.name + ".partial")
            if "step" in (progress or {}):
                raise ValueError('progress must not have "step", which is stored with it')
            progress_file = json.dumps({"step": step, **(progress or {})}) + "\n"
            state = {
                "model": _with_opaque_extra_state(get_model_state_dict(model)),
                "optimizer": optimizer_state(model, optimizer),
                "rng": {f"rank_{self._rank}": _generator_states(_device_of(model))},
            }
            if self._is_first:
                # A link that leads nowhere is taken, too.
                if os.path.lexists(complete):
                    raise ValueError(f"step must be one that is not saved yet, found {complete}")
                self._begin(partial)
        how: dict[str, Any] = {
            "storage_writer": HashingWriter(partial, {PROGRESS: progress_file.encode()}),
            "planner": SafeSavePlanner(),
            "process_group": self._group,
        }
        if self._thread is not None:
            # A writer of files would stage tensors that share memory one by one.
            stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=False,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            )
            written: Any = async_save(state, async_stager=stager, **how)
            written.add_done_callback(lambda _: stager.close())
            self._writing = self._thread.submit(self._finish, written.result, partial, complete)
            return
        with same_error_on_all_ranks(self._group):
            self._finish(lambda: save(state, **how), partial, complete)

    def wait(self) -> None:
        """Wait until the checkpoint that `save` started is complete.

        Raises:
            RuntimeError: on every rank, if it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with same_error_on_all_ranks(self._group):
                writing.result()

    def close(self) -> None:
        """Wait as `wait` does, then release the thread and the process group.

        Raises:
            RuntimeError: see `wait`.
        """
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def newest(self) -> int | None:
        """Find the highest step of which there is a checkpoint, the same on every rank.

        A checkpoint that has lost files counts, so that `progress` and `load` can say so.

        Returns:
            The step, or None if there is no checkpoint.

        Raises:
            RuntimeError: on every rank, if the folder cannot be read.
        """
        self.wait()
        steps: list[int] = []
        with same_error_on_all_ranks(self._group):
            if self._is_first:
                steps = self._steps()
        found: int | None = gather_objects(max(steps, default=None), self._group)[0]
        return found

    def progress(self, step: int) -> dict[str, Any]:
        """Read the `progress` stored with a checkpoint.

        Returns:
            The values given to `save`, and "step".

        Raises:
            ValueError: on every rank, if there is no such step, or files of its checkpoint are
                missing or truncated.
            TypeError: on every rank, if `step` is no int.
        """
        self.wait()
        with same_error_on_all_ranks(self._group):
            path = self._path(step)
            if not os.path.lexists(path):
                saved = ", ".join(map(str, self._steps())) or "none"
                raise ValueError(
                    f"there is no checkpoint of step {step} in {self.folder}, steps saved: {saved}"
                )
            progress = _read_progress(path, step)
            if self._is_first:
                _read_complete(path)
            return progress

    def load(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Read the checkpoint of `step` into model and optimizer, resharding it to their layout.

        Every file is first read by one rank and compared with SHA256SUMS. That takes as long as
        reading the checkpoint once more, or as hashing it (about a second per GB and rank, the
        files being divided over the ranks), and 4 MB of memory. Each rank restores the states of
        its random number generators, if a rank of that number took part in the save; otherwise
        they are left unchanged.

        Returns:
            As `progress`.

        Raises:
            ValueError: on every rank, if there is no such step, or its checkpoint is damaged or
                not safe to load, or was saved from a different model or kind of optimizer, other
                parameter groups, or groups without an option that the optimizer has.
            TypeError: on every rank, if `step` is no int.
            PartialLoadError: on every rank, if reading fails when some rank has begun to load.
                The model may then hold a mix of old and loaded values.
            RuntimeError: on every rank, if reading fails before. As after any error but
                PartialLoadError, model and optimizer are then unchanged.

        The state of the optimizer is read into new tensors, which then replace it.
        """
        progress = self.progress(step)
        path, device = self._path(step), _device_of(model)
        with same_error_on_all_ranks(self._group):
            metadata, sizes, sums = _read_complete(path)
        model_state = get_model_state_dict(model)
        with same_error_on_all_ranks(self._group):
            _check_fits(model_state, metadata, path)
            saved_optimizer = SavedOptimizer(metadata, path, model, optimizer)
        if sums is None and self._is_first:
            warnings.warn(
                f"{path} has no {MANIFEST}, as it was saved by an earlier version: changes to its "
                "data are not noticed",
                stacklevel=2,
            )
        with same_error_on_all_ranks(self._group):
            own_files = share_of_rank(sizes, self._rank, self._world_size)
            _check_data(path, metadata, own_files, sums)
        self._read(path, metadata, saved_optimizer.options)
        with same_error_on_all_ranks(self._group):
            saved_optimizer.match_groups()
            optimizer_entries = saved_optimizer.state_entries()
        own = f"rank_{self._rank}"
        generators = {
            name: one
            for name, one in _generator_states(device).items()
            if f"rng.{own}.{name}" in metadata.state_dict_metadata
        }
        # Nothing to read for a tensor without elements, which an old checkpoint may lack.
        to_read = {
            name: one
            for name, one in _with_opaque_extra_state(model_state).items()
            if not isinstance(one, Tensor) or one.numel()
        }
        state: dict[str, Any] = {**optimizer_entries, "model": to_read}
        state["rng"] = {own: generators} if generators else {}
        self._read(path, metadata, state)
        error: Exception | None = None
        try:
            set_model_state_dict(model, _with_own_extra_state({**model_state, **state["model"]}))
            saved_optimizer.restore({name: state[name] for name in optimizer_entries})
        # Hooks of modules and optimizers can raise anything.
        except Exception as caught:
            error = caught
        try:
            raise_same_error(error, self._group)
        except (ValueError, TypeError, RuntimeError) as shared:
            raise PartialLoadError(
                f"{path} could not be loaded: {shared}; model and optimizer hold a mix of old and "
                "loaded values"
            ) from shared
        _set_generator_states(generators, device)
        return progress

    def _read(self, path: Path, metadata: Metadata, state: dict[str, Any]) -> None:
        """Read the entries of `state`, tensors in place."""
        reader, planner = SafeReader(path, metadata), SafeLoadPlanner()
        try:
            load(state, storage_reader=reader, planner=planner, process_group=self._group)
        except CheckpointException as failure:
            causes = f"{path} could not be loaded: {_causes(failure)}"
            has_begun = planner.has_begun and "model" in state
            if any(gather_objects(has_begun, self._group)):
                raise PartialLoadError(
                    f"{causes}; tensors of the model hold a mix of old and loaded values"
                ) from failure
            raise RuntimeError(causes) from failure

    def _path(self, step: int) -> Path:
        if not isinstance(step, int):
            raise TypeError(f"step must be an int, got {step!r}")
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        """Steps of the checkpoints, in ascending order."""
        if not self.folder.is_dir():
            return []
        names = (COMPLETE.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def _begin(self, partial: Path) -> None:
        """Remove what killed runs left, and create the folder that is to be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.iterdir():
            if left.suffix in UNFINISHED and COMPLETE.fullmatch(left.stem):
                _remove(left)
        partial.mkdir()

    def _finish(self, write: Callable[[], object], partial: Path, complete: Path) -> None:
        """Write the checkpoint; the first rank then renames it and removes old ones."""
        try:
            write()
        except CheckpointException as failure:
            if self._is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise RuntimeError(
                f"checkpoint could not be written to {complete}: {_causes(failure)}"
            ) from failure
        if not self._is_first:
            return
        try:
            _read_complete(partial)
        except ValueError as error:
            raise RuntimeError(
                f"checkpoint could not be written to {complete}: files of other ranks are missing; "
                f"all must see the same {self.folder}: {error}"
            ) from error
        partial.rename(complete)
        paths = (self._path(step) for step in self._steps())
        # What has lost its metadata is no checkpoint that could stand in for an older one.
        others = [path for path in paths if path != complete and (path / METADATA).is_file()]
        for path in others[: len(others) - self.keep + 1]:
            # Renamed first, so that a half-removed folder is never taken for a checkpoint.
            _remove(path.rename(path.with_name(path.name + ".removed")))


def _causes(failure: CheckpointException) -> str:
    """Format the error of each failed rank on one line."""
    return "; ".join(
        f"rank {rank}: {type(wrapped[0]).__name__}: {wrapped[0]}"
        for rank, wrapped in failure.failures.items()
    )


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class _Complete(NamedTuple):
    """What a checkpoint consists of.

    sizes: bytes of each data file, by name.
    sums: SHA-256 sums of its files, by name; None if it has none.
    """

    metadata: Metadata
    sizes: dict[str, int]
    sums: dict[str, str] | None


def _read_complete(path: Path) -> _Complete:
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
    return _Complete(metadata, sizes, sums)


def _read_progress(path: Path, step: int) -> dict[str, Any]:
    with _explained(path):
        content, sums = _file_in(path, PROGRESS).read_bytes(), _read_sums(path)
        try:
            read = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{PROGRESS}: {error}") from error
    if not isinstance(read, dict) or read.get("step") != step:
        raise ValueError(f"{path / PROGRESS} must contain step {step}, got {read}")
    with _explained(path):
        if sums is not None:
            check_sum(PROGRESS, [content], sums)
    return read


def _read_sums(path: Path) -> dict[str, str] | None:
    """Sums in the checkpoint's MANIFEST; None if it has none."""
    if not os.path.lexists(path / MANIFEST):
        return None
    return parse_manifest(_file_in(path, MANIFEST).read_bytes())


def _check_data(
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
    # A truncated pickle can raise nearly anything.
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path} is an incomplete checkpoint: {kind}{error}") from error


def _file_in(path: Path, name: str) -> Path:
    """Path of a file of a checkpoint; raise UnsafeError if it is elsewhere, or no regular file."""
    found = (path / name).resolve(strict=True)
    if not found.is_relative_to(path.resolve()) or not found.is_file():
        raise UnsafeError(f"{name} is not a file in the folder, but {found}")
    return found


def _check_fits(model_state: Mapping[str, Any], metadata: Metadata, path: Path) -> None:
    """Raise ValueError unless the model's shapes and dtypes in the checkpoint are those here."""
    saved = {
        name: (tuple(one.size), one.properties.dtype)
        for name, one in metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(one, TensorStorageMetadata)
    }
    check_same_tensors(saved, dict(_tensors_in(model_state, "model.")), path, "model or optimizer")


def check_same_tensors(
    saved: Mapping[str, tuple[Sequence[int], object]],
    here: Mapping[str, tuple[Sequence[int], object]],
    path: Path,
    owner: str,
) -> None:
    """Raise ValueError if the tensors in a file are not those in memory.

    A file may lack tensors without elements.

    Args:
        saved, here: shape and dtype of each tensor by name.
        path, owner: the file, and what holds the tensors in memory; both for the message.
    """
    differing = [
        f"{name}: saved {saved.get(name, 'nothing')}, here {here.get(name, 'nothing')}"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name) and (name in saved or 0 not in here[name][0])
    ]
    if differing:
        raise ValueError(
            f"{path} was saved from a different {owner}: {len(differing)} tensors differ, "
            f"the first is {differing[0]}"
        )


def _tensors_in(
    state: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Yield (name in torch.distributed.checkpoint, (shape, dtype)) of each tensor in `state`."""
    for name, one in state.items():
        if isinstance(one, Tensor):
            yield prefix + name, (tuple(one.shape), one.dtype)
        elif isinstance(one, Mapping):
            yield from _tensors_in(one, f"{prefix}{name}.")


def _with_opaque_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Wrap what `nn.Module.get_extra_state` gave, so that it is saved whole, as one entry.

    Otherwise each tensor in it is an entry, which a model must have before it can be loaded.
    """
    return {
        name: (one,) if name.endswith(EXTRA_STATE) and not isinstance(one, Tensor) else one
        for name, one in state.items()
    }


def _with_own_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `_with_opaque_extra_state`."""
    return {
        name: one[0] if name.endswith(EXTRA_STATE) and isinstance(one, tuple) else one
        for name, one in state.items()
    }


def _device_of(model: nn.Module) -> torch.device:
    return next((one.device for one in model.parameters()), torch.device("cpu"))


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)

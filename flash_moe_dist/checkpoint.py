"""Sharded checkpoints through torch.distributed.checkpoint, one folder for each saved step.

    folder/step-00000200/           complete: .metadata, *.distcp, progress.json
    folder/step-00000300.partial/   being written, or left by a run that was killed while writing
    folder/step-00000100.removed/   being removed, or left by a run that was killed while removing

A checkpoint is written under a name ending in .partial and renamed once it is complete, so every
folder named step-N can be loaded, on any number of ranks and any meshes.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from flash_moe_dist.agreement import gather_objects, same_error_on_all_ranks
from flash_moe_dist.optimizer_state import SavedOptimizer, optimizer_state
from flash_moe_dist.runtime import DEFAULT_TIMEOUT

PROGRESS = "progress.json"
COMPLETE = re.compile(r"step-(\d{8,})")
# Suffixes of folders being written and being removed.
UNFINISHED = (".partial", ".removed")


class Checkpointer:
    """Saves and loads the model, optimizer, random number generators and progress of a run.

    The constructor and all methods are collective over all ranks, which must see the same folder.

    Args:
        folder: parent of the checkpoints' folders; created by the first `save`.
        keep: number of checkpoints to keep; the oldest are removed once a newer one is complete.
        asynchronous: `save` returns once it has copied the state, and a thread writes the copy.
        timeout: how long ranks wait for each other while saving and loading.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        asynchronous: bool = False,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = folder, keep
        # A separate group, so that a thread can save while the ranks train.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._is_first = dist.get_rank() == 0
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

        Waits for the previous save to finish.

        Args:
            step: number of training steps done; must not have been saved yet.
            progress: values to store with it, serializable as JSON, the same on all ranks.

        Raises:
            ValueError: on every rank, if `step` has already been saved, or the optimizer has a
                parameter that is not one of the model.
            TypeError: on every rank, if `progress`, or a value in the optimizer that is no tensor,
                cannot be serialized.
            RuntimeError: on every rank, if this checkpoint or the previous one cannot be written.
                Complete checkpoints are left unchanged.
        """
        self.wait()
        complete = self._path(step)
        partial = complete.with_name(complete.name + ".partial")
        with same_error_on_all_ranks(self._group):
            state: dict[str, Any] = {
                "model": get_model_state_dict(model),
                "optimizer": optimizer_state(model, optimizer),
                "rng": {f"rank_{dist.get_rank()}": _generator_states(_device_of(model))},
            }
            if self._is_first:
                if complete.exists():
                    raise ValueError(f"step must be one that is not saved yet, found {complete}")
                self._begin(partial, {"step": step, **(progress or {})})
        if self._thread is not None:
            written: Any = async_save(state, checkpoint_id=partial, process_group=self._group)
            self._writing = self._thread.submit(self._finish, written.result, partial, complete)
            return
        with same_error_on_all_ranks(self._group):
            self._finish(
                lambda: save(state, checkpoint_id=partial, process_group=self._group),
                partial,
                complete,
            )

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
            RuntimeError: as `wait`.
        """
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
        dist.destroy_process_group(self._group)

    def newest(self) -> int | None:
        """Find the highest step that has a complete checkpoint, the same on every rank.

        Returns:
            The step, or None if there is no complete checkpoint.

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
            ValueError: on every rank, if they cannot be read.
        """
        self.wait()
        with same_error_on_all_ranks(self._group):
            try:
                read = json.loads((self._path(step) / PROGRESS).read_text())
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self._path(step)} is an incomplete checkpoint: {error}"
                ) from error
            if not isinstance(read, dict) or read.get("step") != step:
                raise ValueError(
                    f"{self._path(step) / PROGRESS} must contain step {step}, got {read}"
                )
            return read

    def load(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Read the checkpoint of `step` into model and optimizer, resharding it to their layout.

        Each rank restores the states of its random number generators, if a rank of that number
        took part in the save; otherwise they are left unchanged.

        Returns:
            As `progress`.

        Raises:
            ValueError: on every rank, if the checkpoint is damaged, or was saved from a different
                model or kind of optimizer, other parameter groups, or groups without options that
                the optimizer has. Model and optimizer are then unchanged.
            RuntimeError: on every rank, if reading fails. Model and optimizer may then hold a mix
                of old and loaded values.
        """
        progress = self.progress(step)
        path, device = self._path(step), _device_of(model)
        with same_error_on_all_ranks(self._group):
            metadata = _complete_metadata(path)
        model_state = get_model_state_dict(model)
        with same_error_on_all_ranks(self._group):
            _check_fits(model_state, metadata, path)
            saved_optimizer = SavedOptimizer(metadata, path, model, optimizer)
        self._read(path, saved_optimizer.options)
        with same_error_on_all_ranks(self._group):
            saved_optimizer.match_groups()
            optimizer_entries = saved_optimizer.state_entries()
        own = f"rank_{dist.get_rank()}"
        generators = {
            name: one
            for name, one in _generator_states(device).items()
            if f"rng.{own}.{name}" in metadata.state_dict_metadata
        }
        # Nothing to read for a tensor without elements, which an old checkpoint may lack.
        state: dict[str, Any] = {
            **optimizer_entries,
            "model": {
                name: one
                for name, one in model_state.items()
                if not isinstance(one, Tensor) or one.numel()
            },
        }
        state["rng"] = {own: generators} if generators else {}
        self._read(path, state)
        set_model_state_dict(model, {**model_state, **state["model"]})
        with same_error_on_all_ranks(self._group):
            saved_optimizer.restore({name: state[name] for name in optimizer_entries})
        _set_generator_states(generators, device)
        return progress

    def _read(self, path: Path, state: dict[str, Any]) -> None:
        """Read the entries of `state`, tensors in place."""
        try:
            load(state, checkpoint_id=path, process_group=self._group)
        except CheckpointException as failure:
            raise RuntimeError(f"{path} could not be loaded: {_causes(failure)}") from failure

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        if not self.folder.is_dir():
            return []
        names = ((COMPLETE.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(
            int(name[1]) for name, path in names if name and (path / ".metadata").is_file()
        )

    def _begin(self, partial: Path, progress: dict[str, Any]) -> None:
        """Remove what killed runs left, and create the folder that is to be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.iterdir():
            if left.suffix in UNFINISHED and COMPLETE.fullmatch(left.stem):
                shutil.rmtree(left)
        partial.mkdir()
        (partial / PROGRESS).write_text(json.dumps(progress) + "\n")

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
            _complete_metadata(partial)
        except ValueError as error:
            raise RuntimeError(
                f"checkpoint could not be written to {complete}: files of other ranks are missing; "
                f"all must see the same {self.folder}: {error}"
            ) from error
        partial.rename(complete)
        others = [self._path(step) for step in self._steps() if self._path(step) != complete]
        for path in others[: len(others) - self.keep + 1]:
            # Renamed first, so that a half-removed folder is never taken for a checkpoint.
            shutil.rmtree(path.rename(path.with_name(path.name + ".removed")))


def _causes(failure: CheckpointException) -> str:
    """Format the error of each failed rank on one line."""
    return "; ".join(
        f"rank {rank}: {type(wrapped[0]).__name__}: {wrapped[0]}"
        for rank, wrapped in failure.failures.items()
    )


def _complete_metadata(path: Path) -> Metadata:
    """Read the metadata; raise ValueError unless every file has all the bytes it refers to."""
    try:
        metadata = FileSystemReader(path).read_metadata()
        short = sorted(
            {
                f"{shard.relative_path} ({(path / shard.relative_path).stat().st_size} bytes)"
                for shard in (metadata.storage_data or {}).values()
                if (path / shard.relative_path).stat().st_size < shard.offset + shard.length
            }
        )
    # A truncated pickle can raise nearly anything.
    except Exception as error:
        raise ValueError(
            f"{path} is an incomplete checkpoint: {type(error).__name__}: {error}"
        ) from error
    if short:
        raise ValueError(f"{path} is an incomplete checkpoint: truncated files: {', '.join(short)}")
    return metadata


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
        path, owner: for the message: the file, and what holds the tensors in memory.
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

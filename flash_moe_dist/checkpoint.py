"""Sharded checkpoints through torch.distributed.checkpoint, one folder for each saved step.

    folder/step-00000200/   .metadata, *.distcp, progress.json, SHA256SUMS

A checkpoint is written under a name ending in .partial and renamed once it is complete, so every
folder named step-N can be loaded, on any number of ranks and any meshes (`checkpoint_folders`).
Before anything is loaded, all files are compared with SHA256SUMS (`checkpoint_integrity`), and
nothing that they name is run (`checkpoint_unpickling`).
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from flash_moe.arguments import check_type, checked_int, checked_path
from flash_moe_dist.agreement import (
    gather_objects,
    raise_differences,
    raise_same_error,
    rank_and_size,
    same_error_on_all_ranks,
)
from flash_moe_dist.checkpoint_folders import StepFolders
from flash_moe_dist.checkpoint_integrity import (
    PROGRESS,
    check_data,
    read_complete,
    read_progress,
)
from flash_moe_dist.checkpoint_manifest import (
    MANIFEST,
    HashingWriter,
    share_of_rank,
)
from flash_moe_dist.checkpoint_unpickling import (
    SafeLoadPlanner,
    SafeReader,
    SafeSavePlanner,
)
from flash_moe_dist.joined_optimizers import JoinedOptimizers
from flash_moe_dist.optimizer_state import SavedOptimizer, optimizer_state
from flash_moe_dist.runtime import DEFAULT_TIMEOUT, check_timeout
from flash_moe_dist.same_tensors import check_same_model

# How keys of a state dict end that hold what nn.Module.get_extra_state gave.
EXTRA_STATE = "_extra_state"


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
        ValueError: `timeout` is not positive; on every rank, if `keep` is less than 1.
        TypeError: `timeout` is no timedelta; on every rank, if another argument has a wrong type.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int = 2,
        asynchronous: bool = False,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        check_timeout(timeout)
        # A separate group, so that a thread can save while the ranks train.
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        with same_error_on_all_ranks(self._group):
            self.folder = checked_path("folder", folder)
            self._folders = StepFolders(self.folder, checked_int("keep", keep, 1))
            check_type("asynchronous", asynchronous, bool)
        self._rank, self._world_size = rank_and_size()
        self._is_first = self._rank == 0
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None
        self._is_closed = False

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Write all that training needs to continue after `step`, each rank its own shards.

        Waits for the previous save to finish. Extra state (`nn.Module.get_extra_state`) and other
        objects are those of rank 0.

        Args:
            step: number of training steps done, 0 or more; must not have been saved yet.
            optimizer: the optimizer, or several of different parameters, in the order
                in which they will be loaded.
            progress: values to store with it by name, serializable as JSON, the same on all ranks;
                without "step", which is added.

        Raises:
            ValueError: on every rank, if `step` is negative, has already been saved or differs
                between the ranks, `progress` has "step" or refers to itself, or the optimizer has a
                parameter that is not one of the model.
            TypeError: on every rank, if an argument has a wrong type, `progress` cannot be
                serialized, or a dict in the optimizer has a key that is no str.
            RuntimeError: on every rank, if this checkpoint or the previous one cannot be written,
                the state holds an object that `load` would not admit, or `close` has been called.
                Complete checkpoints are left unchanged.
        """
        self.wait()
        with same_error_on_all_ranks(self._group):
            partial = self._folders.partial_path(step)
            joined = _checked(model, optimizer)
        raise_differences({"step": step}, self._group)
        with same_error_on_all_ranks(self._group):
            progress_file = _progress_file(step, progress)
            state = {
                "model": _with_opaque_extra_state(get_model_state_dict(model)),
                "optimizer": optimizer_state(model, joined),
                "rng": {f"rank_{self._rank}": _generator_states(_device_of(model))},
            }
            if self._is_first:
                self._folders.begin(step)
        how: dict[str, Any] = {
            "storage_writer": HashingWriter(partial, {PROGRESS: progress_file}),
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
            self._writing = self._thread.submit(self._finish, written.result, step)
            return
        with same_error_on_all_ranks(self._group):
            self._finish(lambda: save(state, **how), step)

    def wait(self) -> None:
        """Wait until the checkpoint that `save` started is complete.

        Raises:
            RuntimeError: on every rank, if it could not be written, or `close` has been called.
        """
        if self._is_closed:
            raise RuntimeError("this Checkpointer has been closed: make another one")
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with same_error_on_all_ranks(self._group):
                writing.result()

    def close(self) -> None:
        """Wait as `wait` does, then release the thread and the process group; again: do nothing.

        Raises:
            RuntimeError: on every rank, if the last checkpoint could not be written.
        """
        if self._is_closed:
            return
        try:
            self.wait()
        finally:
            self._is_closed = True
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
                steps = self._folders.steps()
        found: int | None = gather_objects(max(steps, default=None), self._group)[0]
        return found

    def progress(self, step: int) -> dict[str, Any]:
        """Read the `progress` stored with a checkpoint.

        Returns:
            The values given to `save`, and "step".

        Raises:
            ValueError: on every rank, if there is no such step, or files of its checkpoint are
                missing, truncated or altered.
            TypeError: on every rank, if `step` is no int.
        """
        self.wait()
        with same_error_on_all_ranks(self._group):
            path = self._folders.path(step)
            if not os.path.lexists(path):
                saved = ", ".join(map(str, self._folders.steps())) or "none"
                raise ValueError(
                    f"there is no checkpoint of step {step} in {self.folder}, steps saved: {saved}"
                )
            progress = read_progress(path, step)
            if self._is_first:
                read_complete(path)
            return progress

    def load(
        self, step: int, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]
    ) -> dict[str, Any]:
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
            TypeError: on every rank, if an argument has a wrong type.
            PartialLoadError: on every rank, if reading fails when some rank has begun to load.
                The model may then hold a mix of old and loaded values.
            RuntimeError: on every rank, if reading fails before. As after any error but
                PartialLoadError, model and optimizer are then unchanged.

        The state of the optimizer is read into new tensors, which then replace it.
        """
        progress = self.progress(step)
        with same_error_on_all_ranks(self._group):
            joined = _checked(model, optimizer)
            path, device = self._folders.path(step), _device_of(model)
            metadata, sizes, sums = read_complete(path)
        model_state = get_model_state_dict(model)
        with same_error_on_all_ranks(self._group):
            check_same_model(model_state, metadata, path)
            saved_optimizer = SavedOptimizer(metadata, path, model, joined)
        if sums is None and self._is_first:
            warnings.warn(
                f"{path} has no {MANIFEST}, as it was saved by an earlier version: changes to its "
                "data are not noticed",
                stacklevel=2,
            )
        with same_error_on_all_ranks(self._group):
            own_files = share_of_rank(sizes, self._rank, self._world_size)
            check_data(path, metadata, own_files, sums)
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

    def _finish(self, write: Callable[[], object], step: int) -> None:
        """Write the checkpoint; the first rank then renames it and removes old ones."""
        complete, partial = self._folders.path(step), self._folders.partial_path(step)
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
            read_complete(partial)
        except ValueError as error:
            raise RuntimeError(
                f"checkpoint could not be written to {complete}: files of other ranks are missing; "
                f"all must see the same {self.folder}: {error}"
            ) from error
        self._folders.finish(step)


def _causes(failure: CheckpointException) -> str:
    """Format the error of each failed rank on one line."""
    return "; ".join(
        f"rank {rank}: {type(wrapped[0]).__name__}: {wrapped[0]}"
        for rank, wrapped in failure.failures.items()
    )


def _checked(model: object, optimizer: Any) -> JoinedOptimizers:
    check_type("model", model, nn.Module)
    return JoinedOptimizers(optimizer)


def _progress_file(step: int, progress: Mapping[str, Any] | None) -> bytes:
    """Content of the file that stores `progress` and the step."""
    values = {} if progress is None else progress
    check_type("progress", values, Mapping)
    for name in values:
        if not isinstance(name, str):
            raise TypeError(f"progress must have strings as names, got {name!r}")
    if "step" in values:
        raise ValueError('progress must not have "step", which is stored with it')
    try:
        return (json.dumps({"step": int(step), **values}) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"progress must be serializable as JSON: {error}") from error


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

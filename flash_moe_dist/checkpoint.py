"""Sharded checkpoints through torch.distributed.checkpoint."""

import shutil
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from flash_moe_dist.agreement import same_error_on_all_ranks


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Write model, optimizer and step into `folder`, each rank its own shards; collective.

    The files are written into `folder`.partial; when complete, the checkpoint that was in
    `folder` moves to `folder`.previous, the new one into its place, and the old one goes. Killed
    at any moment, `load_checkpoint` finds a complete one.

    Raises:
        ValueError: on every rank, if `folder` holds something that is no checkpoint.
        RuntimeError: on every rank, if the files cannot be written or moved.
    """
    partial, previous = _beside(folder, "partial"), _beside(folder, "previous")
    with same_error_on_all_ranks():
        if dist.get_rank() == 0:
            check_replaceable(folder)
            if partial.exists():
                shutil.rmtree(partial)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": step}
    try:
        save(state, checkpoint_id=partial)
    except CheckpointException as failure:
        raise RuntimeError(f"checkpoint could not be written to {partial}: {failure}") from failure
    with same_error_on_all_ranks():
        if dist.get_rank() == 0:
            if folder.exists():
                if previous.exists():
                    shutil.rmtree(previous)
                folder.rename(previous)
            partial.rename(folder)
            if previous.exists():
                shutil.rmtree(previous)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Read `folder` into model and optimizer, sharded as they are now; return the step.

    Collective. Takes the previous checkpoint if a save was killed before the new one was in place.

    Raises:
        ValueError: on every rank, if there is no complete checkpoint.
        RuntimeError: on every rank, if it cannot be read, or is one of another model.
    """
    candidates = (folder, _beside(folder, "previous"))
    complete = [one for one in candidates if (one / ".metadata").is_file()]
    with same_error_on_all_ranks():
        if not complete:
            raise ValueError(f"folder must hold a complete checkpoint, found none in {folder}")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    try:
        load(state, checkpoint_id=complete[0])
    except CheckpointException as failure:
        raise RuntimeError(f"{complete[0]} could not be loaded: {failure}") from failure
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
    )
    step = state["step"]
    assert isinstance(step, int)
    return step


def check_replaceable(folder: Path) -> None:
    """Raise ValueError if `folder` holds something that is no checkpoint; OSError if unreadable."""
    if folder.exists() and not (folder / ".metadata").is_file() and any(folder.iterdir()):
        raise ValueError(f"folder must be new, empty or a checkpoint, got {folder}")


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")

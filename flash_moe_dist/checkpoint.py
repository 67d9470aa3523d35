"""Sharded checkpoints through torch.distributed.checkpoint."""

import shutil
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Write model, optimizer and step into `folder`, each rank its own shards; collective.

    The files are written beside it and renamed when complete, so that `folder` is never half
    a checkpoint; a folder of that name is replaced.
    """
    partial = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": step}
    save(state, checkpoint_id=partial)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Read `folder` into model and optimizer, sharded as they are now; return the step.

    Raises:
        ValueError: there is no complete checkpoint in `folder`.
    """
    if not (folder / ".metadata").is_file():
        raise ValueError(f"folder must hold a complete checkpoint, found none in {folder}")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
    )
    step = state["step"]
    assert isinstance(step, int)
    return step

"""Comparison of the tensors in a file with those in memory, by name, shape and dtype."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def check_same_model(model_state: Mapping[str, Any], metadata: Metadata, path: Path) -> None:
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

"""Options that a resumed run takes over from its checkpoint or its start, and what differs."""

import argparse
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from out_folder import replacing

# Options of one call. The batch size and the vocabulary are recorded as they came to be.
NOT_REMEMBERED = {
    *("out", "data", "vocab_size", "batch_size", "keep", "async_checkpoint", "resume"),
    *("timeout", "grace", "time_phases", "given"),
}
# What runs did that recorded none of these options.
BEFORE_OPTIONS = {
    "lr": 2e-3,
    "score_norm": "none",
    "aux_loss_coef": 0.0,
    "z_loss_coef": 0.0,
    "bias_update_rate": 0.0,
    "force_load_balance": False,
    "table_lr_scale": 1.0,
    "table_optimizer": "adamw",
}
# Options of the model that its tensors do not depend on.
CHANGEABLE = ("aux_loss_coef", "z_loss_coef", "force_load_balance")

# In the folder of results: the progress of a run before its first step.
START = "start.json"


def write_start(folder: Path, progress: Mapping[str, Any]) -> None:
    """Record what a run begins with, for one that is resumed before the first checkpoint."""
    with replacing(folder / START) as file:
        file.write(json.dumps(progress).encode())


def read_start(folder: Path) -> dict[str, Any]:
    """Read what `write_start` has written there; empty if it has not.

    Raises:
        ValueError: the file is damaged or cannot be read.
    """
    path = folder / START
    try:
        progress = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"--out must be free of damaged files, got {path}: {error}") from error
    if not isinstance(progress, dict):
        raise ValueError(f"--out must be free of damaged files, got {path}: it is no dictionary")
    return progress


def options_to_remember(args: argparse.Namespace) -> dict[str, Any]:
    """Select the options that a checkpoint records, by name."""
    return {name: value for name, value in vars(args).items() if name not in NOT_REMEMBERED}


def recall(args: argparse.Namespace, saved: Mapping[str, Any], world_size: int) -> None:
    """Set the options that were not given to those of the checkpoint.

    Args:
        args: `args.given` names the options that were given.
        saved: progress of the checkpoint, also one without "options", as older runs saved it.
        world_size: number of ranks; --ep-size is taken over if it is the same as then.

    Raises:
        ValueError: a recorded value is not of the option's type.
    """
    old = {name: saved[name] for name in ("seed", "seq_len") if name in saved}
    if model := saved.get("model", {}):
        old |= BEFORE_OPTIONS | model | {"score_norm": model.get("score_norm") or "none"}
    options = {**old, **saved.get("options", {})}
    if saved.get("world_size") != world_size:
        options.pop("ep_size", None)
    # None reads the standard library without installed packages.
    if saved.get("data") not in (None, sysconfig.get_paths()["stdlib"]):
        options["data"] = Path(saved["data"])
    options.pop("vocab_size", None)
    known = {*options_to_remember(args), "data"}
    for name in known & options.keys() - set(args.given):
        value, default = options[name], getattr(args, name)
        if default is not None and not isinstance(value, type(default)):
            raise ValueError(
                f"the checkpoint records {value!r} for --{name.replace('_', '-')}, which must be "
                f"of type {type(default).__name__}"
            )
        setattr(args, name, value)


def model_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what keeps a checkpoint from being loaded, given the fields of both `ModelConfig`s."""
    # A checkpoint from before there were options of routers.
    saved = {"score_norm": None, "bias_update_rate": 0.0, **saved}
    # Routers have biases if the rate is not 0.
    differing = [
        name
        for name in now.keys() - set(CHANGEABLE)
        if saved[name] != now[name] and (name != "bias_update_rate" or not saved[name] * now[name])
    ]
    return [f"{name} = {saved[name]}, here {now[name]}" for name in now if name in differing]


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each option and other value that is not what the checkpoint recorded."""
    recorded = saved.get("options", {})
    recorded = {**BEFORE_OPTIONS, **recorded} if recorded else {}
    for name, value in now.get("options", {}).items():
        before = recorded.get(name, value)
        if before != value:
            yield f"changed: --{name.replace('_', '-')} {before} before, {value} now"
    for name, value in now.items():
        # What may differ in the model is among the options.
        if name not in ("options", "model") and saved.get(name, value) != value:
            yield f"changed: {name} {saved[name]} before, {value} now"

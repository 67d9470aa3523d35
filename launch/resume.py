"""Options that a resumed run takes over from its checkpoint, and what differs from then."""

import argparse
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Options of one call. The batch size and the vocabulary are recorded as they came to be.
NOT_REMEMBERED = {
    *("out", "data", "vocab_size", "batch_size", "keep", "async_checkpoint", "resume"),
    *("timeout", "grace", "time_phases", "given"),
}


def options_to_remember(args: argparse.Namespace) -> dict[str, Any]:
    """Select the options that a checkpoint records, by name."""
    return {name: value for name, value in vars(args).items() if name not in NOT_REMEMBERED}


def recall(args: argparse.Namespace, saved: Mapping[str, Any], world_size: int) -> None:
    """Set the options that were not given to those of the checkpoint.

    Args:
        args: `args.given` names the options that were given.
        saved: progress of the checkpoint, also one without "options", as older runs saved it.
        world_size: number of ranks; --ep-size is taken over if it is the same as then.
    """
    old = {name: saved[name] for name in ("seed", "seq_len") if name in saved}
    options = {**old, **saved.get("model", {}), **saved.get("options", {})}
    if saved.get("world_size") != world_size:
        options.pop("ep_size", None)
    # None reads the standard library without installed packages.
    if saved.get("data") not in (None, sysconfig.get_paths()["stdlib"]):
        options["data"] = Path(saved["data"])
    options.pop("vocab_size", None)
    for name, value in options.items():
        if name in vars(args) and name not in args.given:
            setattr(args, name, value)


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each option and other value that is not what the checkpoint recorded."""
    for name, value in now.get("options", {}).items():
        before = saved.get("options", {}).get(name, value)
        if before != value:
            yield f"changed: --{name.replace('_', '-')} {before} before, {value} now"
    for name, value in now.items():
        if name != "options" and saved.get(name, value) != value:
            yield f"changed: {name} {saved[name]} before, {value} now"

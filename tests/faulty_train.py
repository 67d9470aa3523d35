"""launch/train.py with a fault or a list of faults, in JSON, in the environment variable FAULT.

what    "sigkill", "sigterm", "raises", "stalls", "nan" or "inf" (of the loss)
where   "before dispatch", "in dispatch" or "after dispatch" of a training step; "writing",
        "written" (but not renamed) or "pruning" of a checkpoint
rank    on which it happens
step    of training, or of the checkpoint
mark    a file that is made when it happens; if it is there already, nothing happens
slow    seconds that every step takes longer
"""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint.filesystem as filesystem

import train
from flash_moe_dist.dispatch import exact

given = json.loads(os.environ["FAULT"])
faults = given if isinstance(given, list) else [given]
step_now = 0


def happening(where: str, step: int) -> str | None:
    """Fault of this rank at this place and step, once; None if there is none."""
    for fault in faults:
        if (fault.get("where"), fault.get("step")) == (where, step):
            mark = Path(fault["mark"])
            if int(os.environ["RANK"]) == fault["rank"] and not mark.exists():
                mark.touch()
                what: str = fault["what"]
                return what
    return None


def strike(what: str | None) -> None:
    if what in ("sigkill", "sigterm"):
        os.kill(os.getpid(), signal.SIGKILL if what == "sigkill" else signal.SIGTERM)
    elif what == "raises":
        raise KeyError("the original error")
    elif what == "stalls":
        time.sleep(1000)


def before(where: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(*args: Any, **kwargs: Any) -> Any:
        strike(happening(where, step_now))
        return function(*args, **kwargs)

    return faulty


def before_path(where: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Let faults happen before a function of a path, or of an object with one, of a checkpoint."""

    def faulty(first: Any, *args: Any, **kwargs: Any) -> Any:
        saved = re.search(r"step-(\d+)", str(getattr(first, "path", first)))
        if saved:
            strike(happening(where, int(saved[1])))
        return function(first, *args, **kwargs)

    return faulty


def faulty_loss(run: Any, stream: Any, step: int, seed: int) -> Any:
    global step_now
    training = stream is run.corpus.train
    if training:
        step_now = step
        time.sleep(max(fault.get("slow", 0) for fault in faults))
        strike(happening("before dispatch", step))
    value = loss(run, stream, step, seed)
    if training:
        what = happening("after dispatch", step)
        strike(what)
        if what in ("nan", "inf"):
            return value * float(what)
    return value


loss = train.Run.loss
patched: Any = train.Run
patched.loss = faulty_loss
patched = exact
patched.start_all_to_all = before("in dispatch", patched.start_all_to_all)
patched = filesystem.FileSystemWriter
# The files of the other ranks, and perhaps some of this one's, are there by then.
patched.write_data = before_path("writing", filesystem.FileSystemWriter.write_data)
patched = Path
patched.rename = before_path("written", Path.rename)
patched = shutil
patched.rmtree = before_path("pruning", shutil.rmtree)
train.main()

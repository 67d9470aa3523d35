"""launch/train.py with a fault, described in JSON by the environment variable FAULT.

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

fault = json.loads(os.environ["FAULT"])
step_now = 0


def happens(where: str, step: int) -> bool:
    if where != fault.get("where") or step != fault["step"]:
        return False
    if int(os.environ["RANK"]) != fault["rank"] or Path(fault["mark"]).exists():
        return False
    Path(fault["mark"]).touch()
    return True


def strike() -> None:
    what = fault["what"]
    if what in ("sigkill", "sigterm"):
        os.kill(os.getpid(), signal.SIGKILL if what == "sigkill" else signal.SIGTERM)
    elif what == "raises":
        raise KeyError("the original error")
    elif what == "stalls":
        time.sleep(1000)


def before(where: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(*args: Any, **kwargs: Any) -> Any:
        if happens(where, step_now):
            strike()
        return function(*args, **kwargs)

    return faulty


def before_path(where: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The first argument, or its attribute, is the path of a checkpoint."""

    def faulty(first: Any, *args: Any, **kwargs: Any) -> Any:
        saved = re.search(r"step-(\d+)", str(getattr(first, "path", first)))
        if saved and happens(where, int(saved[1])):
            strike()
        return function(first, *args, **kwargs)

    return faulty


def faulty_loss(run: Any, stream: Any, step: int, seed: int) -> Any:
    global step_now
    training = stream is run.corpus.train
    if training:
        step_now = step
        time.sleep(fault.get("slow", 0))
        if happens("before dispatch", step):
            strike()
    value = loss(run, stream, step, seed)
    if training and happens("after dispatch", step):
        strike()
        if fault["what"] in ("nan", "inf"):
            return value * float(fault["what"])
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

"""Names and removal of checkpoint folders, one for each saved step.

parent/step-00000200/           complete
parent/step-00000300.partial/   being written, or left by a run that was killed while writing
parent/step-00000100.removed/   being removed, or left by a run that was killed while removing
"""

import os
import re
import shutil
from pathlib import Path

from flash_moe.arguments import checked_int
from flash_moe_dist.checkpoint_integrity import METADATA

COMPLETE = re.compile(r"step-(\d{8,})")
# Suffixes of folders being written and being removed.
UNFINISHED = (".partial", ".removed")


class StepFolders:
    """Folders of the steps in `parent`, of which the newest `keep` are kept."""

    def __init__(self, parent: Path, keep: int) -> None:
        self.parent, self.keep = parent, keep

    def path(self, step: int) -> Path:
        """Path of the folder of a step, whether there is one or not.

        Raises:
            TypeError: `step` is no int.
            ValueError: it is negative.
        """
        return self.parent / f"step-{checked_int('step', step, 0):08d}"

    def partial_path(self, step: int) -> Path:
        """Path under which the folder of a step is written before it is complete; see `path`."""
        complete = self.path(step)
        return complete.with_name(complete.name + ".partial")

    def steps(self) -> list[int]:
        """Steps of which there are folders, in ascending order."""
        if not os.path.lexists(self.parent):
            return []
        names = (COMPLETE.fullmatch(path.name) for path in self.parent.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def begin(self, step: int) -> None:
        """Remove what killed runs left, and create the folder in which a step is written.

        Raises:
            ValueError: the step has been saved.
        """
        complete = self.path(step)
        # A link that leads nowhere is taken, too.
        if os.path.lexists(complete):
            raise ValueError(f"step must be one that is not saved yet, found {complete}")
        self.parent.mkdir(parents=True, exist_ok=True)
        for left in self.parent.iterdir():
            if left.suffix in UNFINISHED and COMPLETE.fullmatch(left.stem):
                remove(left)
        self.partial_path(step).mkdir()

    def finish(self, step: int) -> None:
        """Give a folder that has been written its name, then remove the oldest."""
        complete = self.path(step)
        self.partial_path(step).rename(complete)
        paths = (self.path(step) for step in self.steps())
        # What has lost its metadata is no checkpoint that could stand in for an older one.
        others = [path for path in paths if path != complete and (path / METADATA).is_file()]
        for path in others[: len(others) - self.keep + 1]:
            # Renamed first, so that a half-removed folder is never taken for a checkpoint.
            remove(path.rename(path.with_name(path.name + ".removed")))


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

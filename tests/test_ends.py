"""Processes end without an abort after their last collective."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytestmark = pytest.mark.slow


def test_fifty_ranks_end_without_an_abort() -> None:
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    ended = subprocess.run(
        [sys.executable, str(TESTS / "many_ends.py"), "12"],
        # Its ranks are forks, which a GPU's driver does not survive.
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr

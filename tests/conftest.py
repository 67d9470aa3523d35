"""Environment of the tests: Triton interpreted without a GPU, unwritten memory poisoned."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
from poison import poison_fresh_memory
from ranks import RankPools
from small_run import INTERVALS, SMALL, launch, write_text

from flash_moe.ops.backends import dense, hot_cold

# Tests of runs that must end in time: never two of them at once.
WITH_DEADLINES = ("test_failures", "test_nodes", "test_restart")
# Run first, so that one worker does not end long after the other.
LONGEST = (
    *WITH_DEADLINES,
    *("test_ends", "test_training", "test_checkpoint", "test_capacity", "test_leaks"),
    *("test_scaling", "test_readme", "test_nonfinite", "test_symmetric_memory", "test_bench"),
)

poison_fresh_memory()
if not torch.cuda.is_available():
    interpreter.speed_up()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="leave out tests marked slow, and of each other test all parameters but the first",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                reason = "needs a CUDA device, this machine has none"
                item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("quick"):
        seen: set[str] = set()
        quick = []
        for item in items:
            test = item.nodeid.partition("[")[0]
            if test not in seen and not any(map(item.get_closest_marker, ("slow", "skip"))):
                quick.append(item)
                seen.add(test)
        config.hook.pytest_deselected(items=[item for item in items if item not in quick])
        items[:] = quick


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, and one worker all files with deadlines."""
    from xdist.scheduler import LoadScopeScheduling

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "deadlines" if Path(file).stem in WITH_DEADLINES else file

    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Device on which the Triton kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def small_blocks(device: torch.device) -> Iterator[None]:
    """Small blocks for Triton's interpreter, which scans them element by element."""
    if device.type != "cpu":
        yield
        return
    with hot_cold.tuning(fill_programs=26, repeat_block=16), dense.tuning(block=16, block_zeros=16):
        yield


# One for a session would keep groups that wait, whose gloo threads wake 100 times a second.
@pytest.fixture(scope="module")
def rank_pools() -> Iterator[RankPools]:
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file to train on."""
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="session")
def options(text: str) -> tuple[str, ...]:
    """Options of a run of launch/train.py that is to be interrupted."""
    return (*SMALL, *INTERVALS, "--data", text)


@pytest.fixture(scope="session")
def uninterrupted(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of results of such a run on two ranks that nothing interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted")
    # Where nothing is saved, --resume starts a new run.
    ended = launch(*options, "--out", str(out), "--resume")
    assert ended.returncode == 0, ended.stderr
    assert "resuming" not in ended.stdout
    return out

"""Checkpoints: any number of ranks reads what any other wrote; what is broken is refused whole."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPools
from small_run import everything_in, small_run
from torch import Tensor

# Ranks, and how many of them share out the experts; the others cut tables along columns.
LAYOUTS = ((1, None), (2, None), (3, None), (4, None), (4, 2), (4, 1), (2, 1))
SOME_LAYOUTS = ((1, None), (3, None), (4, 2))
# Experts of the layers of one model: 50 divide by 2 ranks only, 48 by all, and of 2 the last of 3
# or 4 ranks own none.
NUM_EXPERTS = (50, 48, 2)


def run_of(data: str, ep_size: int | None = None, **options: str) -> Any:
    given = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
    return small_run(data, ep_size, *chain(*given))


def run_of_all_sizes(data: str, ep_size: int | None = None) -> Any:
    """A `Run` whose layers have NUM_EXPERTS experts, 2 for each token."""
    import model
    import train

    class Sizes(model.Transformer):
        def __init__(self, config: model.ModelConfig) -> None:
            super().__init__(config)
            for layer, num_experts in zip(self.layers, NUM_EXPERTS, strict=True):
                layer.moe = model.Block(replace(config, num_experts=num_experts)).moe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Transformer", Sizes)
        return small_run(
            data, ep_size, "--num-layers", str(len(NUM_EXPERTS)), "--num-experts-per-tok", "2"
        )


def save(
    data: str, folder: str, ep_size: int | None = None, asynchronous: bool = False, run: Any = None
) -> tuple[dict[str, Tensor], list[float]]:
    """Two steps, a checkpoint, two more steps; what was saved, and the losses after it."""
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder), asynchronous=asynchronous)
    run = run or run_of(data, ep_size)
    for step in (1, 2):
        run.step(step)
    saved = everything_in(run)
    checkpoints.save(2, run.model, run.optimizers, {"seen": [1, 2]})
    losses = [run.step(step).loss for step in (3, 4)]
    checkpoints.close()
    return saved, losses


def load(
    data: str, folder: str, ep_size: int | None = None, run: Any = None
) -> tuple[dict[str, Tensor], list[float]]:
    """Load into a model with other values; return its tensors, and the losses of two more steps."""
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder))
    run = run or run_of(data, ep_size)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(float("nan"))
    assert checkpoints.newest() == 2
    assert checkpoints.load(2, run.model, run.optimizers) == {"step": 2, "seen": [1, 2]}
    loaded = everything_in(run)
    losses = [run.step(step).loss for step in (3, 4)]
    checkpoints.close()
    return loaded, losses


def save_all_sizes(data: str, folder: str, ep_size: int | None) -> Any:
    return save(data, folder, run=run_of_all_sizes(data, ep_size))


def load_all_sizes(data: str, folder: str, ep_sizes: list[int | None]) -> list[Any]:
    """Call `load` once for each number of ranks that share the experts."""
    return [load(data, folder, run=run_of_all_sizes(data, ep_size)) for ep_size in ep_sizes]


def assert_equal(loaded: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    assert loaded.keys() == saved.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("saving", "ep_size"), LAYOUTS)
def test_saved_and_loaded_with_any_ranks_and_meshes(
    saving: int, ep_size: int | None, text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    folder = str(tmp_path / "checkpoints")
    saved, losses = rank_pools.run(saving, save_all_sizes, text, folder, ep_size)[0]
    assert {name.split(" of ")[0] for name in saved if " of " in name} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    # All layouts from tables that are cut both ways and unevenly; else fewer, more and the same.
    loads = LAYOUTS if (saving, ep_size) in ((4, 2), (3, None)) else SOME_LAYOUTS
    for loading in (1, 2, 3, 4):
        ep_sizes = [other for ranks, other in {*loads, (saving, ep_size)} if ranks == loading]
        for of_rank in rank_pools.run(loading, load_all_sizes, text, folder, ep_sizes):
            for other_ep_size, (loaded, next_losses) in zip(ep_sizes, of_rank, strict=True):
                assert_equal(loaded, saved)
                assert next_losses == pytest.approx(losses, rel=1e-5)
                if (loading, other_ep_size) == (saving, ep_size):
                    assert next_losses == losses


def save_tables(data: str, folder: str, name: str) -> Any:
    return save(data, folder, run=run_of(data, table_optimizer=name))


def load_tables(data: str, folder: str, name: str) -> Any:
    return load(data, folder, run=run_of(data, table_optimizer=name))


@pytest.mark.parametrize("name", ["rowwise-adam", "rowwise-adagrad"])
def test_optimizers_of_tables_on_other_numbers_of_ranks(
    name: str, text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    folder = str(tmp_path / "checkpoints")
    saved, losses = rank_pools.run(2, save_tables, text, folder, name)[0]
    own = {"rowwise-adam": {"exp_avg", "exp_avg_sq", "touches"}, "rowwise-adagrad": {"sum"}}[name]
    tables = {key.split(" of ")[0] for key in saved if key.endswith("experts.down_weights")}
    assert tables - {"layers.0.moe.experts.down_weights"} >= own
    for loading in (1, 2, 3):
        for loaded, next_losses in rank_pools.run(loading, load_tables, text, folder, name):
            assert_equal(loaded, saved)
            assert next_losses == pytest.approx(losses, rel=1e-5)
    message = rank_pools.run(1, load_refused, text, folder, "ValueError", {})[0]
    wanted = {"rowwise-adam": "RowwiseAdam", "rowwise-adagrad": "RowwiseAdagrad"}[name]
    assert f"optimizer.kind: saved AdamW, {wanted}, here AdamW" in message


@pytest.mark.gpu
def test_saved_and_loaded_with_nccl(text: str, tmp_path: Path, rank_pools: RankPools) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    for asynchronous in (False, True):
        folder = str(tmp_path / f"asynchronous {asynchronous}")
        args = (text, folder, None, asynchronous)
        saved, losses = rank_pools.run(2, save, *args, backend="nccl")[0]
        for loading, ep_size in ((2, None), (2, 1), (1, None)):
            for loaded, next_losses in rank_pools.run(
                loading, load, text, folder, ep_size, backend="nccl"
            ):
                assert_equal(loaded, saved)
                assert next_losses == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_an_asynchronous_save_holds_the_step_it_was_called_at(
    text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    """Training goes on while the files are written."""
    folder = str(tmp_path / "checkpoints")
    saved, losses = rank_pools.run(2, save_slowly, text, folder)[0]
    for loaded, next_losses in rank_pools.run(2, load, text, folder):
        assert_equal(loaded, saved)
        assert next_losses == losses


def save_slowly(data: str, folder: str) -> tuple[dict[str, Tensor], list[float]]:
    """Save like `save`, with files that are written only after the two steps."""
    import threading

    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from train import Run

    written = FileSystemWriter.write_data
    stepped = threading.Event()
    step = Run.step

    def write_late(writer: Any, *args: Any) -> Any:
        assert stepped.wait(60)
        return written(writer, *args)

    def note(run: Any, number: int) -> Any:
        report = step(run, number)
        if number == 4:
            assert not (Path(folder) / "step-00000002").exists()
            stepped.set()
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", write_late)
        patch.setattr(Run, "step", note)
        return save(data, folder, asynchronous=True)


def draws_around_a_checkpoint(data: str, folder: str) -> tuple[Tensor, Tensor]:
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder))
    run = run_of(data)
    torch.manual_seed(torch.distributed.get_rank() + 5)
    checkpoints.save(1, run.model, run.optimizers)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    checkpoints.load(1, run.model, run.optimizers)
    checkpoints.close()
    return drawn, torch.rand(3)


@pytest.mark.slow
def test_random_number_generators_go_on_rank_by_rank(
    text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    (first, again), (other, other_again) = rank_pools.run(
        2, draws_around_a_checkpoint, text, str(tmp_path)
    )
    assert torch.equal(first, again)
    assert torch.equal(other, other_again)
    assert not torch.equal(first, other)


def save_before_any_step(data: str, folder: str) -> tuple[list[float], list[float]]:
    """Losses without and with a checkpoint before the first step."""
    from flash_moe_dist.checkpoint import Checkpointer

    plain, saved = run_of(data), run_of(data)
    checkpoints = Checkpointer(Path(folder))
    checkpoints.save(0, saved.model, saved.optimizers)
    checkpoints.load(0, saved.model, saved.optimizers)
    checkpoints.close()
    return [[run.step(step).loss for step in (1, 2, 3)] for run in (plain, saved)]  # type: ignore


def test_saving_before_the_first_step_is_no_step(
    text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    ((plain, saved),) = rank_pools.run(1, save_before_any_step, text, str(tmp_path))
    assert plain == saved


def save_four_times(data: str, folder: str, asynchronous: bool) -> list[list[str]]:
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder), keep=2, asynchronous=asynchronous)
    run = run_of(data)
    found = []
    for step in (1, 2, 30, 4):
        checkpoints.save(step, run.model, run.optimizers)
        checkpoints.wait()
        found.append(sorted(path.name for path in Path(folder).iterdir()))
        torch.distributed.barrier()
    assert checkpoints.newest() == 30
    checkpoints.close()
    return found


@pytest.mark.parametrize("asynchronous", [False, True])
def test_old_checkpoints_go(
    asynchronous: bool, text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    """The highest steps are kept, in whatever order they were saved."""
    for found in rank_pools.run(2, save_four_times, text, str(tmp_path), asynchronous)[:1]:
        assert found[0] == ["step-00000001"]
        assert found[1] == ["step-00000001", "step-00000002"]
        assert found[2] == ["step-00000002", "step-00000030"]
        assert found[3] == ["step-00000004", "step-00000030"]


def load_refused(
    data: str, folder: str, kind: str, options: dict[str, str], optimizer: str = "AdamW"
) -> str:
    """Load in vain; return the message. Model, optimizer and generators must stay as they were."""
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder))
    run = run_of(data, None, **options)
    if optimizer != "AdamW":
        run.optimizers = [getattr(torch.optim, optimizer)(run.model.parameters(), lr=0.1)]
    before, drawn = everything_in(run), torch.get_rng_state()
    with pytest.raises((ValueError, RuntimeError)) as raised:
        checkpoints.load(2, run.model, run.optimizers)
    assert raised.type.__name__ == kind
    assert_equal(everything_in(run), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    checkpoints.close()
    return str(raised.value)


@pytest.fixture(scope="module")
def sound(text: str, tmp_path_factory: pytest.TempPathFactory, rank_pools: RankPools) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "checkpoints"
    rank_pools.run(2, save, text, str(folder))
    return folder


def cut(path: Path, keep: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 16
    path.write_bytes(whole)


def move_and_link(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / path.name))


def enlarge_copy(path: Path, copy: Path) -> None:
    """Make the file longer: a shorter one would raise another error."""
    copy.write_bytes(path.read_bytes() + bytes(2**20))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "one file empty": (
        lambda path: cut(path / "__1_0.distcp", 0),
        r"truncated files: __1_0\.distcp",
    ),
    "one byte less": (lambda path: cut(path / "__0_0.distcp", 0.9999), r"truncated files: __0_0"),
    "one file gone": (
        lambda path: (path / "__1_0.distcp").unlink(),
        r"step-00000002 is an incomplete checkpoint: it has no file __1_0\.distcp$",
    ),
    "half of the metadata": (
        lambda path: cut(path / ".metadata", 0.5),
        r"is a damaged checkpoint: \.metadata has SHA-256 sum",
    ),
    "metadata empty": (
        lambda path: cut(path / ".metadata", 0),
        r"is a damaged checkpoint: \.metadata has SHA-256 sum",
    ),
    "something else as metadata": (
        lambda path: (path / ".metadata").write_bytes(b"\x80\x04N."),
        r"is a damaged checkpoint: \.metadata has SHA-256 sum",
    ),
    "no metadata": (
        lambda path: (path / ".metadata").unlink(),
        r"step-00000002 is an incomplete checkpoint: it has no file \.metadata$",
    ),
    "a bit of the data": (
        lambda path: flip(path / "__1_0.distcp"),
        r"is a damaged checkpoint: __1_0\.distcp has SHA-256 sum",
    ),
    "a bit of the metadata": (
        lambda path: flip(path / ".metadata"),
        r"is a damaged checkpoint: \.metadata has SHA-256 sum",
    ),
    "a digit of the progress": (
        lambda path: (path / "progress.json").write_text(json.dumps({"step": 2, "seen": [1, 3]})),
        r"is a damaged checkpoint: progress\.json has SHA-256 sum",
    ),
    "no manifest": (
        lambda path: (path / "SHA256SUMS").unlink(),
        "is an incomplete checkpoint.*SHA256SUMS",
    ),
    "half of the manifest": (
        lambda path: cut(path / "SHA256SUMS", 0.5),
        "is a damaged checkpoint.*SHA256SUMS",
    ),
    "a line of the manifest": (
        lambda path: (path / "SHA256SUMS").write_text(
            re.sub(".*__0_0.*\n", "", (path / "SHA256SUMS").read_text())
        ),
        r"is a damaged checkpoint: __0_0\.distcp .*SHA256SUMS says nothing",
    ),
    "files of each other": (
        lambda path: enlarge_copy(path / "__0_0.distcp", path / "__1_0.distcp"),
        r"is a damaged checkpoint: __1_0\.distcp has SHA-256 sum",
    ),
    "a file elsewhere": (
        lambda path: move_and_link(path / "__1_0.distcp"),
        r"is not safe to load: __1_0\.distcp is not a file in the folder",
    ),
    "a pipe": (
        lambda path: replace_by_pipe(path / ".metadata"),
        r"is a damaged checkpoint: \.metadata is a device, pipe or socket in place of a file",
    ),
    "a folder": (
        lambda path: replace_by_folder(path / "__1_0.distcp"),
        r"is a damaged checkpoint: __1_0\.distcp is a folder in place of a file",
    ),
    "no progress": (
        lambda path: (path / "progress.json").unlink(),
        r"step-00000002 is an incomplete checkpoint: it has no file progress\.json$",
    ),
    "half of the progress": (
        lambda path: cut(path / "progress.json", 0.5),
        r"is a damaged checkpoint: progress\.json has SHA-256 sum",
    ),
    "a bit of the progress": (
        lambda path: flip(path / "progress.json"),
        r"is a damaged checkpoint: progress\.json has SHA-256 sum",
    ),
    "another step's": (
        lambda path: (path / "progress.json").write_text(json.dumps({"step": 3})),
        r"is a damaged checkpoint: progress\.json has SHA-256 sum",
    ),
    "nothing": (
        lambda path: path.rename(path.with_name("step-00000010")),
        "there is no checkpoint of step 2 in .*, steps saved: 10$",
    ),
    "a file in its place": (
        lambda path: path.rename(path.with_name("moved")).with_name(path.name).write_text(""),
        "is no checkpoint: it is not a folder",
    ),
    "a link to nothing": (
        lambda path: (
            path.rename(path.with_name("moved")).with_name(path.name).symlink_to("nowhere")
        ),
        r"is an incomplete checkpoint: it has no file progress\.json$",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_checkpoint_is_refused_and_nothing_touched(
    damage: Callable[[Path], object],
    message: str,
    text: str,
    sound: Path,
    tmp_path: Path,
    rank_pools: RankPools,
) -> None:
    folder = shutil.copytree(sound, tmp_path / "checkpoints")
    damage(folder / "step-00000002")
    for refused in rank_pools.run(2, load_refused, text, str(folder), "ValueError", {}):
        assert re.search(message, refused), refused


FOREIGN: dict[str, tuple[dict[str, str], str, str]] = {
    "hidden size": ({"hidden-size": "32"}, "AdamW", "tensors differ, the first is model.embedding"),
    "more layers": ({"num-layers": "3"}, "AdamW", "saved nothing, here"),
    "fewer layers": ({"num-layers": "1"}, "AdamW", "here nothing"),
    "more experts": ({"num-experts": "60"}, "AdamW", "layers.0.moe.experts.down_weights"),
    "another optimizer": ({}, "Adagrad", "optimizer.kind: saved AdamW, here Adagrad"),
    "one without state": ({}, "SGD", "optimizer.kind: saved AdamW, here SGD"),
}


@pytest.mark.parametrize(("options", "optimizer", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_checkpoint_is_refused_and_nothing_touched(
    options: dict[str, str],
    optimizer: str,
    message: str,
    text: str,
    sound: Path,
    rank_pools: RankPools,
) -> None:
    args = (text, str(sound), "ValueError", options, optimizer)
    for refused in rank_pools.run(2, load_refused, *args):
        assert "was saved from a different model or optimizer" in refused
        assert message in refused


def save_without_space(data: str, folder: str, asynchronous: bool) -> str:
    """Save while the second rank has no space; return the message."""
    import resource

    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder), asynchronous=asynchronous)
    run = run_of(data)
    checkpoints.save(1, run.model, run.optimizers)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        if asynchronous:
            checkpoints.save(2, run.model, run.optimizers)
        with pytest.raises(RuntimeError) as raised:
            checkpoints.wait() if asynchronous else checkpoints.save(2, run.model, run.optimizers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest() == 1
    checkpoints.load(1, run.model, run.optimizers)
    checkpoints.save(2, run.model, run.optimizers)
    checkpoints.wait()
    assert checkpoints.newest() == 2
    checkpoints.close()
    return str(raised.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_space_on_one_rank(
    asynchronous: bool, text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    """An error on all ranks, the checkpoint before it intact, and the same save works later."""
    for message in rank_pools.run(2, save_without_space, text, str(tmp_path), asynchronous):
        assert "checkpoint could not be written to" in message
        assert "rank 1: OSError: [Errno 27] File too large" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def save_where_not_all_see_the_same(data: str, folders: list[str]) -> str:
    """Each rank has a folder of its own, as on machines without a shared file system."""
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folders[torch.distributed.get_rank()]))
    run = run_of(data)
    with pytest.raises(ValueError, match=r"ranks must agree on step \(rank 0: 5, rank 1: 6\)"):
        checkpoints.save(5 + torch.distributed.get_rank(), run.model, run.optimizers)
    with pytest.raises(RuntimeError) as raised:
        checkpoints.save(1, run.model, run.optimizers)
    assert checkpoints.newest() is None
    checkpoints.close()
    return str(raised.value)


def test_a_folder_that_not_all_ranks_see(text: str, tmp_path: Path, rank_pools: RankPools) -> None:
    folders = [str(tmp_path / name) for name in ("first", "second")]
    for message in rank_pools.run(2, save_where_not_all_see_the_same, text, folders):
        assert "files of other ranks are missing; all must see the same" in message


def load_while_saving(data: str, folder: str) -> int | None:
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder), asynchronous=True)
    run = run_of(data)
    run.step(1)
    for step in (1, 2, 3):
        checkpoints.save(step, run.model, run.optimizers)
        assert checkpoints.load(step, run.model, run.optimizers) == {"step": step}
        checkpoints.save(step + 10, run.model, run.optimizers)
        assert checkpoints.newest() == step + 10
    found = checkpoints.newest()
    checkpoints.close()
    return found


def test_loading_waits_for_the_thread_that_saves(
    text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    assert rank_pools.run(2, load_while_saving, text, str(tmp_path)) == [13, 13]


def save_refused(data: str, folder: str) -> list[str]:
    from flash_moe_dist.checkpoint import Checkpointer

    run, messages = run_of(data), []
    checkpoints = Checkpointer(Path(folder))
    checkpoints.save(1, run.model, run.optimizers)
    for step, progress in ((1, None), (2, {"unknown": object()})):
        with pytest.raises((ValueError, TypeError)) as raised:
            checkpoints.save(step, run.model, run.optimizers, progress)
        messages.append(str(raised.value))
    with pytest.raises(ValueError, match='progress must not have "step"'):
        checkpoints.save(2, run.model, run.optimizers, {"step": 3})
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpointer(Path(folder), keep=0)
    checkpoints.close()
    unwritable = Checkpointer(Path(folder) / "step-00000001" / ".metadata")
    with pytest.raises(RuntimeError) as raised_too:
        unwritable.save(1, run.model, run.optimizers)
    unwritable.close()
    return [*messages, str(raised_too.value)]


def test_what_cannot_be_saved_is_refused_on_all_ranks(
    text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    for taken, unknown, unwritable in rank_pools.run(2, save_refused, text, str(tmp_path)):
        assert "step must be one that is not saved yet, found" in taken
        assert "not JSON serializable" in unknown
        assert "rank 0: " in unwritable
        assert "exists" in unwritable or "Not a directory" in unwritable

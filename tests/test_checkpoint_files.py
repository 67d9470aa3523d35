"""Files and folders of checkpoints: altered, unsafe, linked, lost, and of a plain process."""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from flash_moe_dist.checkpoint import Checkpointer, PartialLoadError
from flash_moe_dist.checkpoint_manifest import HashingWriter, share_of_rank
from flash_moe_dist.checkpoint_unpickling import SafeLoadPlanner, SafeSavePlanner, parse_metadata
from flash_moe_dist.export import export_tensors, import_tensors


def trained(model: nn.Module | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 4) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [one for state in optimizer.state.values() for one in state.values()]
    return [one.detach().clone() for one in (*model.parameters(), *states)]


def assert_equal(some: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)


def write_sums(path: Path) -> None:
    """Sums as the author of a checkpoint can make them, for whatever is in it."""
    names = sorted(one.name for one in path.iterdir() if one.name != "SHA256SUMS")
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in names))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a checkpoint of step 1."""
    Checkpointer(tmp_path / "checkpoints").save(1, *trained())
    return tmp_path / "checkpoints" / "step-00000001"


def refusal(path: Path, kind: type[Exception] = ValueError) -> str:
    """Message of loading a checkpoint of step 1, which must leave everything as it was."""
    fresh = trained()
    before = values(*fresh)
    with pytest.raises(kind) as raised:
        Checkpointer(path.parent).load(1, *fresh)
    assert_equal(values(*fresh), before)
    return str(raised.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_in_a_plain_process(asynchronous: bool, tmp_path: Path) -> None:
    first, other = trained(), trained()
    checkpoints = Checkpointer(str(tmp_path), asynchronous=asynchronous)
    assert checkpoints.newest() is None
    checkpoints.save(0, *first, {"seen": 3})
    assert checkpoints.newest() == 0
    assert checkpoints.load(0, *other) == {"step": 0, "seen": 3}
    assert_equal(values(*other), values(*first))
    checkpoints.close()
    path = tmp_path / "step-00000000"
    written = (path / "SHA256SUMS").read_text()
    write_sums(path)
    assert (path / "SHA256SUMS").read_text() == written


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_is_done_after_close(asynchronous: bool, tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, asynchronous=asynchronous)
    checkpoints.save(1, *trained())
    checkpoints.close()
    checkpoints.close()
    for method in (
        checkpoints.newest,
        checkpoints.wait,
        partial(checkpoints.progress, 1),
        partial(checkpoints.load, 1, *trained()),
        partial(checkpoints.save, 2, *trained()),
    ):
        with pytest.raises(RuntimeError, match="this Checkpointer has been closed"):
            method()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_default_device_is_not_used(asynchronous: bool, tmp_path: Path) -> None:
    first, other = trained(), trained()
    for model, optimizer in (first, other):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5 if model is first[0] else 0.25)
        optimizer.step()
    with torch.device("meta"):
        checkpoints = Checkpointer(tmp_path / "checkpoints", asynchronous=asynchronous)
        checkpoints.save(1, *first)
        checkpoints.load(1, *other)
        checkpoints.close()
        assert_equal(values(*other), values(*first))
        assert other[1].param_groups[0]["lr"].item() == 0.5
        export_tensors(tmp_path / "file", first[0].state_dict())
        nn.init.zeros_(other[0].get_parameter("weight"))
        import_tensors(tmp_path / "file", other[0].state_dict())
        assert_equal(values(*other), values(*first))


def test_numbers_of_numpy_are_saved_as_those_of_python(tmp_path: Path) -> None:
    first, other = trained(), trained()
    first[1].param_groups[0].update(lr=np.float32(0.5), note=[np.int64(3), np.array(2)])
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, *first)
    checkpoints.load(1, *other)
    loaded = other[1].param_groups[0]
    assert (loaded["lr"], *loaded["note"]) == (0.5, 3, 2)
    assert [type(one) for one in (loaded["lr"], *loaded["note"])] == [float, int, int]


def test_a_folder_of_another_name_or_kind(saved: Path) -> None:
    saved.rename(saved.with_name("step-00000005"))
    with pytest.raises(ValueError, match=r"must contain step 5, got \{'step': 1\}"):
        Checkpointer(saved.parent).progress(5)
    with pytest.raises(RuntimeError, match=r"Not a directory: .*\.metadata"):
        Checkpointer(saved.with_name("step-00000005") / ".metadata").newest()


class Marks:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.marker, "was run")


class MarksByMethod(Marks):
    """Names a method of an admitted class, as the pickle's global."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


class MarksByTorch(Marks):
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return torch.save, (0, str(self.marker))


@pytest.mark.parametrize("kind", [Marks, MarksByMethod, MarksByTorch])
def test_metadata_runs_nothing(kind: type[Marks], saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = kind(marker)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    write_sums(saved)
    assert ".metadata refers to " in refusal(saved)
    assert not marker.exists()
    # Which would have been left otherwise.
    pickle.loads((saved / ".metadata").read_bytes())
    assert marker.exists()


def test_metadata_changes_no_class() -> None:
    """The opcode b sets the second of two states as attributes, of a class too."""
    pickled = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(Vmarker\nI1\ndtb."
    with pytest.raises(Exception, match=r".*"):
        parse_metadata(pickled)
    assert not hasattr(Metadata, "marker")
    pickle.loads(pickled)
    assert Metadata.__dict__["marker"] == 1
    del Metadata.marker  # type: ignore[attr-defined]


def test_entries_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    model, optimizer = trained()
    optimizer.param_groups[0]["note"] = Marks(marker)
    checkpoints = Checkpointer(tmp_path / "checkpoints")
    with pytest.raises(RuntimeError, match=r"note is not read: .*add_safe_globals") as raised:
        checkpoints.save(1, model, optimizer)
    assert "checkpoint could not be written to" in str(raised.value)
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(SafeSavePlanner, "transform_object", DefaultSavePlanner.transform_object)
    checkpoints.save(1, model, optimizer)
    message = refusal(tmp_path / "checkpoints" / "step-00000001")
    assert "is not safe to load: optimizer.param_groups" in message
    assert not marker.exists()


@pytest.mark.parametrize("elsewhere", ["../data", "{outside}", "..", "inside/data"])
def test_metadata_names_no_file_elsewhere(elsewhere: str, saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "checkpoints" / "data"
    (saved / "inside").mkdir()
    for place in (outside, saved / "inside" / "data"):
        shutil.copy(saved / "__0_0.distcp", place)
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = elsewhere.format(outside=outside)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    (saved / "SHA256SUMS").unlink()
    assert "is not safe to load: .metadata refers to the file" in refusal(saved)


def test_a_checkpoint_without_sums_is_loaded_with_one_warning(tmp_path: Path) -> None:
    """Earlier versions saved no sums."""
    first, other = trained(), trained()
    model, optimizer = get_state_dict(*first)
    path = tmp_path / "step-00000001"
    state = {"model": model, "optimizer": optimizer, "rng": {"rank_0": {}}}
    save(state, checkpoint_id=path)
    (path / "progress.json").write_text(json.dumps({"step": 1}))
    with pytest.warns(UserWarning, match="SHA256SUMS") as warned:
        assert Checkpointer(tmp_path).load(1, *other) == {"step": 1}
    assert sum("SHA256SUMS" in str(one.message) for one in warned) == 1
    assert_equal(values(*other), values(*first))
    # Sums that were made later are compared.
    write_sums(path)
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[-1] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    assert "__0_0.distcp has SHA-256 sum" in refusal(path)


def test_an_error_says_whether_loading_had_begun(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **kwargs: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        # Called once the first tensor has been chosen to be overwritten.
        patch.setattr(SafeLoadPlanner, "commit_tensor", fail)
        with pytest.raises(PartialLoadError, match=r"the disk is gone; .* hold a mix of old and"):
            Checkpointer(saved.parent).load(1, *trained())
    monkeypatch.setattr(filesystem.FileSystemReader, "set_up_storage_reader", fail)
    assert "the disk is gone" in refusal(saved, RuntimeError)


def test_links_and_files_with_names_of_unfinished_folders(tmp_path: Path) -> None:
    """They do not keep a checkpoint from being saved, and links are not followed."""
    kept, folder = tmp_path / "kept", tmp_path / "checkpoints"
    kept.mkdir()
    folder.mkdir()
    (kept / "file").write_text("of the user")
    (folder / "step-00000001.partial").symlink_to(kept)
    (folder / "step-00000002.partial").write_text("a file")
    (folder / "step-00000003.partial").symlink_to("nowhere")
    (folder / "step-00000004.removed").symlink_to(kept / "file")
    checkpoints = Checkpointer(folder, keep=1)
    checkpoints.save(1, *trained())
    assert [one.name for one in folder.iterdir()] == ["step-00000001"]
    # An older checkpoint that has been moved away.
    (folder / "step-00000001").rename(kept / "older")
    (folder / "step-00000001").symlink_to(kept / "older")
    checkpoints.load(1, *trained())
    checkpoints.save(2, *trained())
    assert [one.name for one in folder.iterdir()] == ["step-00000002"]
    assert (kept / "older" / ".metadata").exists()
    assert (kept / "file").read_text() == "of the user"


def test_nothing_is_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.write_text("of the user")
    for name in ("__0_0.distcp", ".metadata.tmp", "progress.json", "SHA256SUMS"):
        write_data = HashingWriter.write_data

        def plant(writer: Any, *args: Any, name: str = name, write: Any = write_data) -> Any:
            os.symlink(outside, writer.path / name)
            return write(writer, *args)

        with monkeypatch.context() as patch:
            patch.setattr(HashingWriter, "write_data", plant)
            with pytest.raises(RuntimeError, match="FileExistsError"):
                Checkpointer(tmp_path / "checkpoints").save(1, *trained())
        assert outside.read_text() == "of the user"


@pytest.mark.parametrize("lost", [".metadata", "everything"])
def test_a_checkpoint_that_has_lost_its_metadata_is_not_skipped(lost: str, saved: Path) -> None:
    checkpoints = Checkpointer(saved.parent, keep=1)
    for path in saved.iterdir():
        if lost in (path.name, "everything"):
            path.unlink()
    assert checkpoints.newest() == 1
    with pytest.raises(ValueError, match="is an incomplete checkpoint"):
        checkpoints.progress(1)
    checkpoints.save(2, *trained())
    checkpoints.save(3, *trained())
    # What is not whole is neither counted among those to keep nor removed.
    assert sorted(path.name for path in saved.parent.iterdir()) == [saved.name, "step-00000003"]


class WithExtraState(nn.Linear):
    extra: Any

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_saved_and_loaded_or_refused(tmp_path: Path) -> None:
    model, other = WithExtraState(3, 4), WithExtraState(3, 4)
    other.extra = None
    (_, optimizer), (_, other_optimizer) = trained(model), trained(other)
    model.extra = {"scale": 2.0, "history": torch.arange(3), "names": ["a", ("b", None)]}
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, model, optimizer)
    checkpoints.load(1, other, other_optimizer)
    assert str(other.extra) == str(model.extra)
    model.extra = io.StringIO("anything")
    with pytest.raises(RuntimeError, match=r"_extra_state is not read: .*add_safe_globals"):
        checkpoints.save(2, model, optimizer)
    assert checkpoints.newest() == 1


def test_each_file_is_hashed_by_one_rank() -> None:
    sizes = {"a": 50, "b": 30, "c": 30, "d": 10, "e": 0}
    for world_size in (1, 2, 3, 7):
        shares = [share_of_rank(sizes, rank, world_size) for rank in range(world_size)]
        assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert [share_of_rank(sizes, rank, 2) for rank in (0, 1)] == [["a", "d", "e"], ["b", "c"]]

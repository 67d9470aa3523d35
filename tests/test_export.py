"""Whole tables in one file: out of any number of ranks, into any other, a piece at a time."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPools, rank_runtime
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded import whole
from small_run import small_run
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

LAYOUTS = ((1, None), (2, None), (3, None), (4, 2), (4, 1))


def export(data: str, path: str, ep_size: int | None) -> dict[str, Tensor]:
    from flash_moe_dist.export import export_tensors

    run = small_run(data, ep_size)
    run.step(1)
    export_tensors(Path(path), run.model.state_dict())
    return {name: whole(tensor).clone() for name, tensor in run.model.state_dict().items()}


def import_back(data: str, path: str, ep_size: int | None) -> dict[str, Tensor]:
    from flash_moe_dist.export import import_tensors

    run = small_run(data, ep_size)
    import_tensors(Path(path), run.model.state_dict())
    return {name: whole(tensor).clone() for name, tensor in run.model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("ranks", "ep_size"), LAYOUTS)
def test_out_and_into_any_ranks_and_meshes(
    ranks: int, ep_size: int | None, text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    path = tmp_path / "model.safetensors"
    exported = rank_pools.run(ranks, export, text, str(path), ep_size)[0]
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert_equal(load_file(path), exported)
    for other_ranks, other_ep_size in LAYOUTS:
        for imported in rank_pools.run(other_ranks, import_back, text, str(path), other_ep_size):
            assert_equal(imported, exported)


def test_a_file_of_others_goes_into_a_sharded_model(
    text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    """safetensors itself writes the file, in an order of its own."""
    shapes = rank_pools.run(1, import_shapes, text)[0]
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape).to(dtype) for name, (shape, dtype) in reversed(shapes.items())
    }
    save_file(tensors, tmp_path / "model.safetensors", {"made": "elsewhere"})
    for imported in rank_pools.run(3, import_back, text, str(tmp_path / "model.safetensors"), None):
        assert_equal(imported, dict(tensors))


def import_shapes(data: str) -> dict[str, Any]:
    state = small_run(data).model.state_dict()
    return {name: (one.shape, one.dtype) for name, one in state.items()}


def odd_tensors() -> dict[str, Tensor]:
    """All dtypes, no elements, no dimensions, rows for one rank only; the same on every rank."""
    from flash_moe_dist.export import DTYPES

    mesh = rank_runtime().ep_mesh
    torch.manual_seed(0)
    drawn = {str(dtype): (torch.randn(5, 3, 2) * 10).to(dtype) for dtype in DTYPES}
    drawn |= {"scalar": torch.randn(()), "bf16 scalar": torch.randn(()).bfloat16()}
    drawn |= {"no rows": torch.zeros(0, 3), "no columns": torch.zeros(3, 0), "one": torch.ones(1)}
    sharded: dict[str, Tensor] = dict(drawn)
    for place in (Shard(0), Shard(1), Shard(2), Replicate()):
        for dtype in (torch.bfloat16, torch.float64):
            tensor = torch.randn(5, 3, 2).to(dtype)
            sharded[f"{place} {dtype}"] = distribute_tensor(tensor, mesh, [place])
    sharded["a row"] = distribute_tensor(torch.randn(1, 4), mesh, [Shard(0)])
    sharded["column of a slice"] = torch.randn(4, 6)[:, 1:3]
    return sharded


def round_trip(path: str) -> dict[str, Tensor]:
    from flash_moe_dist import export

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "PIECE_BYTES", 32)
        tensors = odd_tensors()
        export.export_tensors(Path(path), tensors)
        emptied = odd_tensors()
        for tensor in emptied.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        export.import_tensors(Path(path), emptied)
    found = {name: whole(tensor).clone() for name, tensor in tensors.items()}
    assert_equal({name: whole(tensor) for name, tensor in emptied.items()}, found)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_odd_tensors_in_tiny_pieces(ranks: int, tmp_path: Path, rank_pools: RankPools) -> None:
    path = tmp_path / "odd.safetensors"
    for found in rank_pools.run(ranks, round_trip, str(path)):
        assert_equal(load_file(path), found)


def memory_of_large_tables(path: str) -> dict[str, int]:
    """Bytes beyond a rank's own memory, at most, while 512 MiB go out and come in."""
    from flash_moe_dist.export import export_tensors, import_tensors

    runtime = rank_runtime()
    rows = 2**17
    tables: dict[str, Tensor] = {}
    for name, place in (("rows", Shard(0)), ("columns", Shard(1))):
        shape = (rows // runtime.world_size, 512) if name == "rows" else (rows, 512)
        local = torch.ones(shape[0], 512 if name == "rows" else 512 // runtime.world_size)
        tables[name] = DTensor.from_local(local, runtime.ep_mesh, [place])
    found = {}
    for what in (export_tensors, import_tensors):
        dist.barrier()
        # The highest that the kernel has seen from here on.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        what(Path(path), tables)
        found[what.__name__] = resident("VmHWM") - before
    return found


def resident(what: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if what in line)
    return int(line.split()[1]) * 1024


def test_no_rank_holds_more_than_a_piece_beyond_its_own(
    tmp_path: Path, rank_pools: RankPools
) -> None:
    from flash_moe_dist.export import PIECE_BYTES

    path = tmp_path / "large.safetensors"
    for found in rank_pools.run(2, memory_of_large_tables, str(path)):
        for name, extra in found.items():
            # Its own half of the two tables is 256 MiB.
            assert extra < 2.5 * PIECE_BYTES, f"{name}: {extra / 2**20:.0f} MiB"
    assert path.stat().st_size > 2**29


def refused(data: str, path: str, what: str) -> str:
    """Import in vain; return the message. The model must stay as it was."""
    from flash_moe_dist.export import import_tensors

    run = small_run(data, None, *(("--num-experts", "60") if what == "experts" else ()))
    if what == "dtype":
        run.model.to(torch.bfloat16)
    before = {name: whole(tensor).clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(ValueError, match="safetensors") as raised:
        import_tensors(Path(path), run.model.state_dict())
    after = {name: whole(tensor) for name, tensor in run.model.state_dict().items()}
    assert_equal(after, before)
    return str(raised.value)


REFUSED = {
    "missing": "cannot be read as a safetensors file",
    "truncated": "cannot be read as a safetensors file",
    "empty": "cannot be read as a safetensors file",
    "something else": "cannot be read as a safetensors file",
    "experts": "layers.0.moe.experts.down_weights: saved ([50, 16], 'F32')",
    "dtype": "here ([256, 16], 'BF16')",
    "one less": "saved nothing, here",
    "one more": "here nothing",
}


@pytest.mark.parametrize(("what", "message"), REFUSED.items())
def test_files_that_do_not_fit_are_refused_and_nothing_touched(
    what: str, message: str, text: str, tmp_path: Path, rank_pools: RankPools
) -> None:
    path = tmp_path / "model.safetensors"
    if what != "missing":
        exported = rank_pools.run(2, export, text, str(path), None)[0]
    if what == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif what == "empty":
        os.truncate(path, 0)
    elif what == "something else":
        path.write_text(json.dumps({"no": "tensors"}) * 10)
    elif what in ("one less", "one more"):
        exported.pop("final_norm.weight")
        extra = {"something": torch.ones(2)} if what == "one more" else {}
        save_file({**(exported if what == "one less" else load_file(path)), **extra}, path)
    for found in rank_pools.run(2, refused, text, str(path), what):
        assert message in found


def export_refused(path: str, what: str) -> str:
    import resource

    from flash_moe_dist.export import export_tensors

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"large": torch.ones(5000)}
    if what == "dtype":
        tensors = {"large": torch.ones(2, dtype=torch.complex64)}
    elif what == "no space":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises((TypeError, RuntimeError)) as raised:
            export_tensors(Path(path), tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(raised.value)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    tmp_path: Path, rank_pools: RankPools
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("the one before")
    for message in rank_pools.run(2, export_refused, str(path), "dtype"):
        assert "large must have one of the dtypes torch.float64, torch.float32" in message
        assert "got torch.complex64" in message
    for message in rank_pools.run(2, export_refused, str(path), "no space"):
        assert "rank 0: [Errno 27] File too large" in message
    assert path.read_text() == "the one before"
    assert len(list(tmp_path.iterdir())) == 1
    for message in rank_pools.run(2, export_refused, str(tmp_path / "no" / "folder"), ""):
        assert "No such file or directory" in message


def test_in_a_plain_process(tmp_path: Path) -> None:
    """Export needs no process group, and takes a path as text; the file says what it holds."""
    from flash_moe_dist.export import export_tensors, import_tensors

    path = str(tmp_path / "model.safetensors")
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    emptied = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    (tmp_path / "of the user").write_text("not to be written to")
    (tmp_path / "model.safetensors.partial").symlink_to("of the user")
    export_tensors(path, tensors)
    import_tensors(path, emptied)
    assert (tmp_path / "of the user").read_text() == "not to be written to"
    assert_equal(emptied, tensors)
    assert_equal(load_file(path), tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_is_no_tensor_is_refused_in_words(tmp_path: Path) -> None:
    from flash_moe_dist.export import export_tensors, import_tensors

    path = tmp_path / "model.safetensors"
    export_tensors(path, {})
    before = path.read_bytes()
    for function in (export_tensors, import_tensors):
        for tensors, message in (
            ({"a._extra_state": {"scale": 1}}, "a._extra_state must be a tensor, got a dict"),
            ([torch.ones(1)], "tensors must map names to tensors, got a list"),
        ):
            with pytest.raises(TypeError, match=message):
                function(path, tensors)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            function(3, {})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="another name than __metadata__"):
            function(path, {"__metadata__": torch.ones(1)})
    assert path.read_bytes() == before


def of_one_rank_only(path: str) -> str:
    from flash_moe_dist.export import export_tensors

    wrong: Any = 3
    with pytest.raises(TypeError) as raised:
        export_tensors(wrong if dist.get_rank() == 1 else path, {"a": torch.ones(1)})
    return str(raised.value)


def test_a_wrong_argument_of_one_rank_is_an_error_of_all(
    tmp_path: Path, rank_pools: RankPools
) -> None:
    for message in rank_pools.run(2, of_one_rank_only, str(tmp_path / "model.safetensors")):
        assert message.startswith("rank 1: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["safetensors", "numpy"])
def test_a_missing_package_is_named_with_what_installs_it(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the parent too, so that the module is imported anew, and the old one is back afterwards.
    monkeypatch.delitem(sys.modules, "flash_moe_dist.export", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{missing}: pip install flash-moe\[export\]"):
        importlib.import_module("flash_moe_dist.export")

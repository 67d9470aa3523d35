"""The READMEs: every example runs, and commands, files, messages and variables are as they say."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPools
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.run import get_args_parser
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe_dist import ExpertParallel

REPOSITORY = Path(__file__).parent.parent
READMES = ("README.md", "flash_moe/README.md", "flash_moe_dist/README.md", "launch/README.md")
MAX_BYTES = 9000

OP = "# op.py"
LAYER = "# layer.py"
SHARD = "# torchrun --standalone --nproc-per-node 2 shard.py"
MODEL = "# torchrun --standalone --nproc-per-node 4 model.py"
SAVE = "# torchrun --standalone --nproc-per-node 2 save.py"
OWN = "# own.py"
ROUTER = "# router.py"
TABLES = "# tables.py"
ONE_BY_ONE = """import runpy, sys
for script in sys.argv[1:]:
    runpy.run_path(script, run_name="__main__")
"""


def text_of(readme: str) -> str:
    return (REPOSITORY / readme).read_text()


def blocks(language: str) -> list[str]:
    """Code blocks of all READMEs in that language."""
    fenced = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [block for readme in READMES for block in fenced.findall(text_of(readme))]


def example(first_line: str) -> str:
    (found,) = (block for block in blocks("python") if block.startswith(first_line + "\n"))
    return found


def write_example(folder: Path, first_line: str, appended: str = "") -> Path:
    """Write the block into a file of the name at the end of its first line."""
    script = folder / first_line.split()[-1]
    script.write_text(example(first_line) + appended)
    return script


def run_on_ranks(ranks: int, *scripts: Path) -> str:
    """Run the scripts one after the other under torchrun; returns what all ranks printed."""
    folder = scripts[0].parent
    # In the same processes: starting them takes longer than what they do.
    one_by_one = folder / "one_by_one.py"
    one_by_one.write_text(ONE_BY_ONE)
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *launcher, str(one_by_one), *map(str, scripts)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_python_block_has_a_test() -> None:
    first_lines = [block.splitlines()[0] for block in blocks("python")]
    assert sorted(first_lines) == sorted((OP, LAYER, SHARD, MODEL, SAVE, OWN, ROUTER, TABLES))


def own_module() -> Any:
    names: dict[str, Any] = {}
    exec(example(OWN), names)
    torch.manual_seed(0)
    return names["OwnExperts"]()


def sharded_own_module() -> Tensor:
    """Run the README's own module sharded, then with an error of one rank; return its output."""
    module = own_module()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(module, mesh, ExpertParallel())
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    out: Tensor = module(x)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="rank 1: "):
        module(x[:, 1:] if dist.get_rank() == 1 else x)
    return out.detach()


def test_example_of_a_module_of_ones_own(rank_pools: RankPools) -> None:
    module = own_module()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        module(torch.randn(8, 63))
    for rank, out in enumerate(rank_pools.run(2, sharded_own_module)):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank))
        torch.testing.assert_close(out, module(x))


def test_example_of_a_router() -> None:
    names: dict[str, Any] = {}
    exec(example(ROUTER), names)
    norm = names["model"].router.score_norm
    assert norm.running_mean.abs().max() > 0
    assert names["router_loss"](names["model"]).item() == 0


def test_example_of_table_optimizers() -> None:
    names: dict[str, Any] = {}
    exec(example(TABLES), names)
    _, optimizer = names["optimizers"]
    for table in names["tables"]:
        assert table.grad is None
        assert optimizer.state[table]["touches"].max() == 2


@pytest.mark.slow
def test_examples_of_two_ranks(tmp_path: Path) -> None:
    op = write_example(tmp_path, OP, "print(x.grad.shape, down.grad.shape)\n")
    write_example(tmp_path, LAYER, "print(y.shape)\n")
    shard, save = write_example(tmp_path, SHARD), write_example(tmp_path, SAVE)
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    printed = run_on_ranks(ranks, op, shard, save, save)
    assert printed.count("torch.Size([64, 256]) torch.Size([10000, 256])") == ranks
    assert printed.count("torch.Size([32, 256])") == ranks
    assert printed.count(f"torch.Size([{100_000 // ranks}, 256])") == ranks
    # The second run continues after the step that the first one saved.
    checkpoints = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000001", "step-00000002"]
    tables = load_file(tmp_path / "out" / "experts.safetensors")
    assert {name: table.shape for name, table in tables.items()} == dict.fromkeys(
        ("down_weights", "up_weights"), (100_000, 64)
    )


@pytest.mark.slow
def test_example_of_four_ranks(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count() if torch.cuda.is_available() else 4
    if ranks < 4:
        pytest.skip(f"needs four GPUs or none, this machine has {ranks}")
    load, seconds = run_on_ranks(4, write_example(tmp_path, MODEL)).splitlines()
    # 32 tokens of 16 experts on each of the four ranks.
    assert load.startswith("2,048 pairs, busiest rank ")
    assert "'experts_backward'" in seconds


def commands() -> Iterator[list[str]]:
    """Words of every command in a bash block, without comments."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def check_command(words: list[str]) -> None:
    """Raise unless the command exists and takes these options."""
    from comparison.arguments import parse as parse_comparison
    from flash_moe.bench.__main__ import parse as parse_bench
    from options import parse_args
    from scaling.arguments import parse as parse_scaling
    from table_optimizers.arguments import parse as parse_table_optimizers

    match words:
        case [assigned, *command] if assigned.startswith("TORCHRUN_ARGS="):
            torchrun = [*shlex.split(assigned.partition("=")[2]), "--nproc-per-node", "2", "it.py"]
            get_args_parser().parse_args(torchrun)
            check_command(command)
        case ["torchrun", *launcher]:
            taken = get_args_parser().parse_args(launcher)
            assert taken.training_script == "launch/bench_scaling.py"
            parse_scaling("", taken.training_script_args, False, int(taken.nproc_per_node))
        case ["python", "launch/compare.py", *options]:
            parse_comparison("", options)
        case ["python", "launch/bench_table_optimizers.py", *options]:
            parse_table_optimizers("", options, False)
        case ["launch/train.sh", *options]:
            parse_args("", options)
        case ["sbatch", *options]:
            parse_args("", options[options.index("launch/slurm.sbatch") + 1 :])
        case ["launch/test.sh", *options]:
            assert all(option in text_of("launch/test.sh") for option in options)
        case ["python", "-m", "flash_moe.bench", *options]:
            parse_bench(options)
        case [".", "launch/setup.sh", extra]:
            assert f"\n{extra} = [" in text_of("pyproject.toml")
        case ["pip", "install", "."]:
            pass
        case _:
            raise AssertionError(f"no check for the command {shlex.join(words)}")
    scripts = [word for word in words if word.startswith("launch/")]
    assert all((REPOSITORY / script).is_file() for script in scripts)
    assert words[0] not in scripts or os.access(REPOSITORY / words[0], os.X_OK)


@pytest.mark.parametrize("words", list(commands()), ids=shlex.join)
def test_command_takes_its_options(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    check_command(words)


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_bytes()) <= MAX_BYTES


def listed_tree() -> set[str]:
    """Files and folders of the tree in README.md, where `name(_kernels)` is two files."""
    (tree,) = re.findall(r"^```\n(flash_moe/.*?)^```$", text_of("README.md"), re.DOTALL | re.M)
    listed, folder = set(), ""
    for line in tree.splitlines():
        name = line.partition(":")[0]
        if not name.startswith(" "):
            folder = name
            listed.add(folder)
            continue
        file = folder + name.strip() + ("" if "." in name else ".py")
        listed |= {file.replace("(_kernels)", ""), file.replace("(_kernels)", "_kernels")}
    return listed


def test_tree_lists_every_file() -> None:
    files = [
        file
        for package in ("flash_moe", "flash_moe_dist", "launch")
        for file in (REPOSITORY / package).rglob("*")
        if file.suffix in (".py", ".sh", ".sbatch", ".txt")
    ]
    expected = {str(file.relative_to(REPOSITORY)) for file in files if file.name != "__init__.py"}
    expected |= {f"{file.parent.relative_to(REPOSITORY)}/" for file in files}
    assert listed_tree() - {"tests/"} == expected


def test_promises_name_tests_that_exist() -> None:
    named = {name for readme in READMES for name in re.findall(r"\btest_\w+\.py", text_of(readme))}
    assert len(named) >= 8
    assert {name for name in named if not (REPOSITORY / "tests" / name).is_file()} == set()


def section(readme: str, title: str) -> str:
    """Text below the heading `## title`, up to the next one."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text_of(readme), re.DOTALL | re.M)
    return str(found)


def test_where_a_change_goes_names_what_there_is() -> None:
    quoted = re.findall(r"`([^`]+)`", section("flash_moe_dist/README.md", "Where a change goes"))
    files = {name for name in quoted if name.endswith(".py")}
    identifiers = {name for dotted in quoted if dotted not in files for name in dotted.split(".")}
    identifiers = {name for name in identifiers if name.isidentifier()}
    assert {"ops/expert_math.py", "dispatch/exact.py"} < files
    assert {"ExpertTables", "DISPATCHERS"} < identifiers
    paths = [f"/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.rglob("*.py")]
    assert {name for name in files if not any(path.endswith(f"/{name}") for path in paths)} == set()
    code = source()
    assert {name for name in identifiers if not re.search(rf"\b{name}\b", code)} == set()


def test_stats_are_documented() -> None:
    from flash_moe_dist.dispatch.capacity import DispatchStats

    text = section("flash_moe_dist/README.md", "ExpertParallel")
    table = text[text.index("| field |") :]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == [field.name for field in fields(DispatchStats)]


def test_links_lead_to_files() -> None:
    findings = [f"findings/{file.name}" for file in (REPOSITORY / "findings").glob("*.md")]
    broken = [
        (readme, link)
        for readme in (*READMES, *findings)
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(readme))
        if not ((REPOSITORY / readme).parent / link).exists()
    ]
    assert broken == []


def source() -> str:
    """All source outside of tests, with the parts of each string literal joined."""
    packages = ("flash_moe", "flash_moe_dist", "launch")
    files = [file for name in packages for file in sorted((REPOSITORY / name).rglob("*"))]
    text = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".sh", ".sbatch"))
    return re.sub(r'"\n\s*f?"', "", text)


def test_troubleshooting_has_the_messages_of_the_code() -> None:
    table = section("launch/README.md", "Troubleshooting")
    first_column = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    parts = [
        part.strip()
        for cell in first_column
        for message in re.findall(r"`([^`]+)`", cell)
        for part in message.split("…")
        if part.strip()
    ]
    code = source()
    assert len(parts) >= 10
    assert [part for part in parts if part not in code] == []


def test_environment_variables_are_documented() -> None:
    code = source()
    read = {
        name
        for form in (
            r'environ(?:\.get|\.setdefault)?[(\[]\s*"([A-Z_]+)"',
            r'"([A-Z_]+)" (?:not )?in os\.environ',
            r"\$\{([A-Z_]+):-",
            r'(?:switch|positive_number)\("([A-Z_]+)"',
        )
        for name in re.findall(form, code)
    }
    assert "FLASH_MOE_BACKEND" in read
    documented = set(re.findall(r"`([A-Z_]+)`", text_of("flash_moe_dist/README.md")))
    assert read - documented == set()

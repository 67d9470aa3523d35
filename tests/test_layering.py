"""Imports point one way, launch to flash_moe_dist to flash_moe, in no cycle, and are declared."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# From the lowest up: a layer may import those before it.
LAYERS = ("flash_moe", "flash_moe_dist", "launch")


def modules_in(repository: Path) -> dict[str, Path]:
    """Files by module name; scripts in launch/ import each other by names without "launch."."""
    found = {}
    for layer in LAYERS:
        for path in (repository / layer).rglob("*.py"):
            root = repository / layer if layer == "launch" else repository
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def names_imported_by(path: Path) -> Iterator[str]:
    """Dotted names after `import` and `from`, in functions too; relative imports are refused."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imports_in(repository: Path) -> dict[str, set[str]]:
    """Modules of the repository that each imports."""
    modules = modules_in(repository)
    return {
        module: {
            name if name in modules else name.rpartition(".")[0]
            for name in names_imported_by(path)
            if name in modules or name.rpartition(".")[0] in modules
        }
        for module, path in modules.items()
    }


def layer_of(path: Path, repository: Path) -> int:
    return LAYERS.index(path.relative_to(repository).parts[0])


def upward_imports(repository: Path) -> list[str]:
    modules = modules_in(repository)
    return [
        f"{module} imports {imported}"
        for module, all_imported in imports_in(repository).items()
        for imported in sorted(all_imported)
        if layer_of(modules[imported], repository) > layer_of(modules[module], repository)
    ]


def cycle(repository: Path) -> list[str]:
    """Modules of an import cycle, the first one again at the end; empty if there is none."""
    try:
        TopologicalSorter(imports_in(repository)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def imports_of_torch_distributed(repository: Path) -> list[str]:
    """Modules of the lowest layer that import torch.distributed."""
    return sorted(
        module
        for module, path in modules_in(repository).items()
        if layer_of(path, repository) == 0
        and any(f"{name}.".startswith("torch.distributed.") for name in names_imported_by(path))
    )


def test_all_modules_are_looked_at() -> None:
    imports = imports_in(REPOSITORY)
    assert "flash_moe.ops.pairs" in imports["flash_moe.ops.expert_math"]
    assert "flash_moe" in imports["model"]
    assert {"data", "flash_moe_dist.runtime"} <= imports["train"]
    assert any(imported.startswith("scaling.") for imported in imports["bench_scaling"])


def test_no_module_imports_a_layer_above() -> None:
    assert upward_imports(REPOSITORY) == []


def test_no_modules_import_each_other() -> None:
    assert cycle(REPOSITORY) == []


def test_flash_moe_does_not_import_torch_distributed() -> None:
    assert imports_of_torch_distributed(REPOSITORY) == []


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A small repository without faults."""
    for name, text in {
        "flash_moe/__init__.py": "from flash_moe.op import run\n",
        "flash_moe/op.py": "import torch\ndef run() -> None: ...\n",
        "flash_moe_dist/__init__.py": "from flash_moe import op\n",
        "launch/train.py": "from data import load\nimport flash_moe_dist\n",
        "launch/data.py": "from flash_moe.op import run\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward_imports(tmp_path) == cycle(tmp_path) == []
    assert imports_of_torch_distributed(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("flash_moe/op.py", "import flash_moe_dist", "flash_moe.op imports flash_moe_dist"),
        ("flash_moe/op.py", "from data import load", "flash_moe.op imports data"),
        ("flash_moe_dist/__init__.py", "import data", "flash_moe_dist imports data"),
        (
            "flash_moe/op.py",
            "def late() -> None:\n    from flash_moe_dist import op",
            "flash_moe.op imports flash_moe_dist",
        ),
    ],
)
def test_a_planted_upward_import_is_found(name: str, line: str, found: str, planted: Path) -> None:
    with (planted / name).open("a") as file:
        file.write(line + "\n")
    assert upward_imports(planted) == [found]


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("flash_moe/op.py", "import flash_moe.op", ["flash_moe.op"]),
        ("flash_moe/op.py", "from flash_moe import run", ["flash_moe", "flash_moe.op"]),
        ("launch/data.py", "from train import main", ["data", "train"]),
    ],
)
def test_a_planted_cycle_is_found(name: str, line: str, found: list[str], planted: Path) -> None:
    with (planted / name).open("a") as file:
        file.write(line + "\n")
    assert {*cycle(planted)} == {*found}


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
    ],
)
def test_a_planted_import_of_torch_distributed_is_found(line: str, planted: Path) -> None:
    with (planted / "flash_moe" / "op.py").open("a") as file:
        file.write(line + "\n")
    assert imports_of_torch_distributed(planted) == ["flash_moe.op"]


def undeclared_imports(repository: Path) -> list[str]:
    """Imports of the packages, but of what an extra is for, that are no declared dependency."""
    (declared,) = re.findall(
        r"^dependencies = \[\n(.*?)^\]", (REPOSITORY / "pyproject.toml").read_text(), re.S | re.M
    )
    known = {*re.findall(r'"([a-z]+)', declared), *LAYERS, *sys.stdlib_module_names, "_typeshed"}
    return sorted(
        f"{module} imports {name}"
        for module, path in modules_in(repository).items()
        if layer_of(path, repository) < LAYERS.index("launch")
        and not f"{module}.".startswith(("flash_moe.bench.", "flash_moe_dist.export."))
        for name in {name.split(".")[0] for name in names_imported_by(path)} - known
    )


def test_packages_import_declared_dependencies_only() -> None:
    assert undeclared_imports(REPOSITORY) == []


def test_a_planted_undeclared_import_is_found(planted: Path) -> None:
    with (planted / "flash_moe" / "op.py").open("a") as file:
        file.write("import tqdm\n")
    assert undeclared_imports(planted) == ["flash_moe.op imports tqdm"]

"""Old names work, are the new objects, and warn where they are used."""

import subprocess
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import flash_moe
import flash_moe_dist
from flash_moe import deprecated
from flash_moe_dist import deprecated as deprecated_dist

# Warnings that `pytest.warns` does not match would go on to the summary.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated. use:DeprecationWarning")

MODULES = deprecated.MODULES | deprecated_dist.MODULES
NAMES = deprecated.NAMES | deprecated_dist.NAMES
# Imports that scripts may contain, and the new object; they do not follow from the tables.
IMPORTS = {
    "from flash_moe.bench.ceilings import measure_ceilings": "flash_moe.bench.device_rates",
    "from flash_moe.bench.floors import launch_bound": "flash_moe.bench.roofline",
    "from flash_moe.bench.peers import load_func": "flash_moe.bench.baselines",
    "from flash_moe.ops.arrange import raise_index_errors": "flash_moe.ops.indices",
    "from flash_moe.ops.backends import default_backend": "flash_moe.ops.backend_choice",
    "from flash_moe.ops.backends.gather import sum_pieces": "flash_moe.ops.backends.gather",
    "from flash_moe.ops.checks import check_expert_inputs": "flash_moe.ops.input_checks",
    "from flash_moe.ops.cost import hot_threshold": "flash_moe.ops.backend_choice",
    "from flash_moe.ops.launch import cdiv": "flash_moe.ops.triton_launch",
    "from flash_moe_dist import normal_rows_": "flash_moe_dist.initialization",
    "from flash_moe_dist import time_steps": "flash_moe_dist.phases",
    "from flash_moe_dist.collectives import all_to_all_rows": "flash_moe_dist.dispatch.collectives",
    "from flash_moe_dist.dispatch import AllToAllDispatcher": "flash_moe_dist.dispatch.exact",
    "from flash_moe_dist.initialization import normal_rows_": "flash_moe_dist.initialization",
    "from flash_moe_dist.peer_memory import peer_memory_bytes": (
        "flash_moe_dist.dispatch.symmetric_memory"
    ),
    "from flash_moe_dist.sharding import experts_per_rank": "flash_moe_dist.dispatch.partition",
    "from flash_moe_dist.steps import step": "flash_moe_dist.phases",
    "from flash_moe_dist.steps import time_steps": "flash_moe_dist.phases",
    "from flash_moe_dist.volume import Widths": "flash_moe_dist.dispatch.comm_volume",
    "from flash_moe_dist.volume import cheaper_dispatcher": "flash_moe_dist.dispatch.comm_volume",
}


def look_up(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


@pytest.mark.parametrize(("old", "new"), NAMES.items(), ids=NAMES)
def test_an_old_name_is_the_new_object(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"^{old} is deprecated: use {new}$"):
        found = look_up(old)
    assert found is look_up(new)


@pytest.mark.parametrize(("old", "new"), MODULES.items(), ids=MODULES)
def test_an_old_module_has_the_public_names_of_the_new(old: str, new: str) -> None:
    public = [name for name in vars(import_module(new)) if not name.startswith("_")]
    assert public
    for name in public:
        with pytest.warns(DeprecationWarning, match=f"^{old}.{name} is deprecated: use "):
            found = look_up(f"{old}.{name}")
        assert found is look_up(f"{new}.{name}")


@pytest.mark.parametrize(("statement", "module"), IMPORTS.items(), ids=IMPORTS)
def test_old_imports_work(statement: str, module: str) -> None:
    imported: dict[str, Any] = {}
    with pytest.warns(DeprecationWarning, match="is deprecated: use flash_moe"):
        exec(statement, imported)
    assert imported[statement.split()[-1]].__module__ == module


@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each old module be imported anew, as in a new process."""
    for old in MODULES:
        package, _, name = old.rpartition(".")
        # To ask the package for the attribute would import the old module.
        if name in vars(import_module(package)):
            monkeypatch.delattr(import_module(package), name)
        monkeypatch.delitem(sys.modules, old, raising=False)


# Statements that import an old module and read none of its attributes.
MODULE_IMPORTS = {
    "import flash_moe_dist.sharding": "flash_moe_dist.sharding",
    "import flash_moe_dist.sharding as sharding": "flash_moe_dist.sharding",
    "from flash_moe_dist import sharding": "flash_moe_dist.sharding",
    "from flash_moe.bench import peers": "flash_moe.bench.peers",
    "import flash_moe_dist; flash_moe_dist.sharding": "flash_moe_dist.sharding",
    "import importlib; importlib.import_module('flash_moe.ops.cost')": "flash_moe.ops.cost",
}


@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize(("statement", "old"), MODULE_IMPORTS.items(), ids=MODULE_IMPORTS)
def test_importing_an_old_module_warns_where_it_is_imported(statement: str, old: str) -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated: use") as warned:
        exec(compile(statement, "script.py", "exec"), {})
    assert [(str(one.message), one.filename) for one in warned] == [
        (f"{old} is deprecated: use {MODULES[old]}", "script.py")
    ]


@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize("old", MODULES)
def test_old_modules_are_found_without_a_warning(old: str) -> None:
    import_module(old.rpartition(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = find_spec(old)
    assert spec is not None
    assert spec.name == old
    module = import_module(old)
    assert find_spec(old) is module.__spec__


@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize("old", MODULES)
def test_a_star_import_binds_the_old_names_and_the_public_names(old: str) -> None:
    imported: dict[str, Any] = {}
    with pytest.warns(DeprecationWarning, match=f"^{old} is deprecated: use {MODULES[old]}$"):
        exec(f"from {old} import *", imported)
    del imported["__builtins__"], imported["__warningregistry__"]
    renamed = {name.rpartition(".")[2] for name in NAMES if name.rpartition(".")[0] == old}
    new = import_module(MODULES[old])
    assert imported.keys() == renamed | {name for name in vars(new) if not name.startswith("_")}
    assert all(found is getattr(new, name, found) for name, found in imported.items())


def test_an_old_module_is_an_attribute_of_its_package() -> None:
    imported: dict[str, Any] = {}
    exec("import flash_moe.ops.arrange, flash_moe_dist.steps as steps", imported)
    with pytest.warns(DeprecationWarning, match="use flash_moe.raise_index_errors"):
        found = imported["flash_moe"].ops.arrange.raise_index_errors
    assert found is flash_moe.raise_index_errors
    with pytest.warns(DeprecationWarning, match="use flash_moe_dist.time_phases"):
        assert imported["steps"].time_steps is flash_moe_dist.time_phases


def test_each_call_site_warns_once() -> None:
    module: Any = flash_moe_dist
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for _ in range(3):
            assert module.time_steps
        assert module.time_steps
    assert [one.filename for one in warned] == [__file__] * 2
    assert warned[0].lineno < warned[1].lineno


@pytest.mark.parametrize(
    "name",
    ["flash_moe_dist.unknown", "flash_moe_dist.steps.unknown", "flash_moe.ops.arrange._records"],
)
def test_other_names_are_unknown_as_before(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute '{attribute}'"):
        look_up(name)


def test_nothing_is_imported_before_an_old_name_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new_place.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(flash_moe, "old_place", None, raising=False)
    deprecated.register({"flash_moe.old_place": "new_place"}, {})
    with pytest.warns(DeprecationWarning, match="flash_moe.old_place is deprecated"):
        module = import_module("flash_moe.old_place")
    assert "new_place" not in sys.modules
    with pytest.warns(DeprecationWarning, match="flash_moe.old_place.answer .* new_place.answer"):
        assert module.answer == 42
    del sys.modules["new_place"], sys.modules["flash_moe.old_place"]


def test_new_names_do_not_warn() -> None:
    subprocess.run(
        [
            *(sys.executable, "-W", "error::DeprecationWarning", "-c"),
            "from flash_moe import *; from flash_moe_dist import *",
        ],
        check=True,
    )

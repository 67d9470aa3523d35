"""Old names of modules, functions and classes, each of which warns when it is used.

A name works for one release after it has changed; then its line here is removed.
"""

import sys
import warnings
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

# Old module: new module.
MODULES = {
    "flash_moe.ops.arrange": "flash_moe.ops.indices",
    "flash_moe.ops.aside": "flash_moe.ops.side_stream",
    "flash_moe.ops.checks": "flash_moe.ops.input_checks",
    "flash_moe.ops.cost": "flash_moe.ops.backend_choice",
    "flash_moe.ops.formulas": "flash_moe.ops.expert_math",
    "flash_moe.ops.hot_pairs": "flash_moe.ops.hot_experts",
    "flash_moe.ops.launch": "flash_moe.ops.triton_launch",
    "flash_moe.ops.parts": "flash_moe.ops.overlap",
}
# Old name: new name, where more than the module has changed.
NAMES = {
    "flash_moe.ops.arrange.arrange_ragged": "flash_moe.ops.indices.check_ragged",
    "flash_moe.ops.arrange.arrange_slots": "flash_moe.ops.indices.check_and_sort",
    "flash_moe.ops.arrange.raise_index_errors": "flash_moe.raise_index_errors",
    "flash_moe.ops.aside.Aside": "flash_moe.ops.side_stream.SideStream",
    "flash_moe.ops.backends.BACKENDS": "flash_moe.ops.backend_choice.BACKENDS",
    "flash_moe.ops.backends.TRITON_BACKENDS": "flash_moe.ops.backend_choice.TRITON_BACKENDS",
    "flash_moe.ops.backends.accumulator_dtype": "flash_moe.ops.dtypes.accumulator_dtype",
    "flash_moe.ops.backends.check_backend": "flash_moe.ops.backend_choice.check_backend",
    "flash_moe.ops.backends.choose_backend": "flash_moe.ops.backend_choice.choose_backend",
    "flash_moe.ops.backends.default_backend": "flash_moe.ops.backend_choice.default_backend",
    "flash_moe.ops.backends.ragged_backend": "flash_moe.ops.backend_choice.ragged_backend",
    "flash_moe.ops.parts.RowsIn": "flash_moe.ops.overlap.InputChunk",
    "flash_moe.ops.parts.RowsOut": "flash_moe.ops.overlap.OutputChunk",
}


def register(modules: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Make old names resolve to new ones, with a DeprecationWarning at each use.

    Nothing is imported until an old name is used. Old modules are added to `sys.modules`, so both
    `import old.module` and `from old.module import name` work.

    Args:
        modules: new module by old module. All public names of the new module are found in the old.
        names: new name by old name, with their modules. The old name's module is a key of
            `modules`, or is already imported.
    """
    for old in modules:
        package, _, name = old.rpartition(".")
        sys.modules[old] = ModuleType(old, f"Deprecated: {modules[old]} replaces this module.")
        setattr(sys.modules[package], name, sys.modules[old])
    for owner in {*modules, *(name.rpartition(".")[0] for name in names)}:
        # PEP 562: called for names that the module lacks. Set here, not defined in the module,
        # where it would make a type checker accept every name.
        resolve = partial(_resolve, owner, modules.get(owner), names)
        sys.modules[owner].__dict__["__getattr__"] = resolve


def _resolve(owner: str, replacement: str | None, names: Mapping[str, str], name: str) -> Any:
    """Find the attribute `name` of the module `owner`, replaced by the module `replacement`."""
    old = f"{owner}.{name}"
    new = names.get(old)
    if new is None and replacement is not None and not name.startswith("_"):
        new = f"{replacement}.{name}"
    if new is not None:
        module, _, attribute = new.rpartition(".")
        found = getattr(import_module(module), attribute, None)
        if found is not None:
            warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=2)
            return found
    raise AttributeError(f"module {owner!r} has no attribute {name!r}")

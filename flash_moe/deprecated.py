"""Old names of modules, functions and classes, each of which warns when it is used.

A name works for one release after it has changed; then its line here is removed.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules whose frames lie between a statement that imports and the loader of the old module.
_IMPORT_SYSTEM = (__name__, "importlib", "importlib._bootstrap")
# Old module: new module.
MODULES = {
    "flash_moe.bench.ceilings": "flash_moe.bench.device_rates",
    "flash_moe.bench.floors": "flash_moe.bench.roofline",
    "flash_moe.bench.peers": "flash_moe.bench.baselines",
    "flash_moe.ops.arrange": "flash_moe.ops.indices",
    "flash_moe.ops.aside": "flash_moe.ops.side_stream",
    "flash_moe.ops.checks": "flash_moe.ops.input_checks",
    "flash_moe.ops.cost": "flash_moe.ops.backend_choice",
    "flash_moe.ops.hot_pairs": "flash_moe.ops.hot_experts",
    "flash_moe.ops.launch": "flash_moe.ops.triton_launch",
    "flash_moe.ops.parts": "flash_moe.ops.overlap",
}
# Old name: new name, where more than the module has changed.
NAMES = {
    "flash_moe.bench.ceilings.Ceilings": "flash_moe.bench.device_rates.DeviceRates",
    "flash_moe.bench.ceilings.measure_ceilings": (
        "flash_moe.bench.device_rates.measure_device_rates"
    ),
    "flash_moe.bench.floors.Floor": "flash_moe.bench.roofline.RooflineTime",
    "flash_moe.bench.floors.floors": "flash_moe.bench.roofline.roofline_time",
    "flash_moe.bench.floors.pairs_of_experts": "flash_moe.bench.roofline.pairs_per_expert",
    "flash_moe.bench.measure.LARGEST_ERROR": "flash_moe.bench.measure.MAX_ERROR",
    "flash_moe.bench.measure.LARGEST_PEER_ERROR": "flash_moe.bench.measure.MAX_BASELINE_ERROR",
    "flash_moe.bench.measure.LARGEST_PEER_TABLE_ERROR": (
        "flash_moe.bench.measure.MAX_BASELINE_TABLE_ERROR"
    ),
    "flash_moe.bench.measure.start_of_peak": "flash_moe.bench.measure.reset_peak_bytes",
    "flash_moe.bench.peers.SUBJECT": "flash_moe.bench.baselines.OURS",
    "flash_moe.ops.arrange.arrange_ragged": "flash_moe.ops.indices.check_ragged",
    "flash_moe.ops.arrange.arrange_slots": "flash_moe.ops.indices.check_and_sort",
    "flash_moe.ops.arrange.raise_index_errors": "flash_moe.raise_index_errors",
    "flash_moe.ops.aside.Aside": "flash_moe.ops.side_stream.SideStream",
    "flash_moe.ops.aside.side_stream": "flash_moe.ops.side_stream.new_stream",
    "flash_moe.ops.backends.BACKENDS": "flash_moe.ops.backend_choice.BACKENDS",
    "flash_moe.ops.backends.TRITON_BACKENDS": "flash_moe.ops.backend_choice.TRITON_BACKENDS",
    "flash_moe.ops.backends.accumulator_dtype": "flash_moe.ops.dtypes.accumulator_dtype",
    "flash_moe.ops.backends.check_backend": "flash_moe.ops.backend_choice.check_backend",
    "flash_moe.ops.backends.choose_backend": "flash_moe.ops.backend_choice.choose_backend",
    "flash_moe.ops.backends.default_backend": "flash_moe.ops.backend_choice.default_backend",
    "flash_moe.ops.backends.ragged_backend": "flash_moe.ops.backend_choice.ragged_backend",
    "flash_moe.ops.backends.gather.sum_pieces": "flash_moe.ops.backends.gather.add_partial_sums",
    "flash_moe.ops.backends.spmm_t_in_turn": "flash_moe.ops.backends.defaults.spmm_t_in_turn",
    "flash_moe.ops.cost.LEAST_PAIRS_ASIDE": (
        "flash_moe.ops.backend_choice.MIN_PAIRS_FOR_SIDE_STREAM"
    ),
    "flash_moe.ops.cost.LEAST_SECONDS_TO_SPLIT": (
        "flash_moe.ops.backend_choice.MIN_SECONDS_FOR_HOT_COLD"
    ),
    "flash_moe.ops.cost.takes_products": "flash_moe.ops.backend_choice.supports_products",
    "flash_moe.ops.parts.RowsIn": "flash_moe.ops.overlap.InputChunk",
    "flash_moe.ops.parts.RowsOut": "flash_moe.ops.overlap.OutputChunk",
}


class _OldModules(MetaPathFinder, Loader):
    """Finds old modules for the import system, and warns when one is imported."""

    def __init__(self, modules: Mapping[str, str], names: Mapping[str, str]) -> None:
        self.modules, self.names = modules, names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.modules else None

    def exec_module(self, module: ModuleType) -> None:
        new = self.modules[module.__name__]
        module.__doc__ = f"Deprecated: {new} replaces this module."
        _resolve_missing(module, self.modules, self.names)
        _warn(module.__name__, new)


def register(modules: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Make old names resolve to new ones, with a DeprecationWarning at each use.

    Importing an old module warns too, once in a process. No new module is imported before a name
    of the old one is used.

    Args:
        modules: new module by old module. All public names of the new module are found in the old.
        names: new name by old name, with their modules. The old name's module is a key of
            `modules`, is already imported, or calls `resolve_old_names` when it is.
    """
    sys.meta_path.append(_OldModules(modules, names))
    for owner in {old.rpartition(".")[0] for old in (*modules, *names)}:
        if owner in sys.modules:
            _resolve_missing(sys.modules[owner], modules, names)


def resolve_old_names(owner: str) -> None:
    """Make the old names in NAMES resolve in the module `owner`, which calls this."""
    _resolve_missing(sys.modules[owner], MODULES, NAMES)


def _resolve_missing(
    module: ModuleType, modules: Mapping[str, str], names: Mapping[str, str]
) -> None:
    # PEP 562: called for names that the module lacks. Set here, not defined in the module, where
    # it would make a type checker accept every name.
    module.__dict__["__getattr__"] = partial(_resolve, module.__name__, modules, names)


def _resolve(owner: str, modules: Mapping[str, str], names: Mapping[str, str], name: str) -> Any:
    """Find the attribute `name`, which the module `owner` lacks."""
    old = f"{owner}.{name}"
    if old in modules:
        return import_module(old)
    replacement, new = modules.get(owner), names.get(old)
    if replacement is not None and name == "__all__":
        return _public_names(owner, replacement, names)
    if new is None and replacement is not None and not name.startswith("_"):
        new = f"{replacement}.{name}"
    if new is not None:
        module, _, attribute = new.rpartition(".")
        found = getattr(import_module(module), attribute, None)
        if found is not None:
            _warn(old, new)
            return found
    raise AttributeError(f"module {owner!r} has no attribute {name!r}")


def _public_names(owner: str, replacement: str, names: Mapping[str, str]) -> list[str]:
    """List what `from owner import *` binds."""
    public = {name for name in vars(import_module(replacement)) if not name.startswith("_")}
    renamed = {old.rpartition(".")[2] for old in names if old.rpartition(".")[0] == owner}
    return sorted(public | renamed)


def _warn(old: str, new: str) -> None:
    """Warn at the line that uses the old name: outside of this module and of the import system."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in _IMPORT_SYSTEM and frame.f_back is not None:
        frame = frame.f_back
    warnings.warn_explicit(
        f"{old} is deprecated: use {new}",
        DeprecationWarning,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__", "<string>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )

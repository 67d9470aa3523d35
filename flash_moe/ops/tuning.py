"""Configurations of kernels and buffers that a `with` block can change for a while.

with gather.tuning(spmm_t_split_pairs=4):
    triton_flash_expert_func(...)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


class Tuning(Generic[Config]):
    """Holds the configuration of one module, for all threads of the process.

    Args:
        config: a frozen dataclass with the defaults. The one in force is `tuning.config`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @contextmanager
    def __call__(self, **changes: Any) -> Iterator[Config]:
        """Set these fields inside the `with` block.

        Raises:
            TypeError: there is no such field.
        """
        before = self.config
        self.config = replace(before, **changes)
        try:
            yield self.config
        finally:
            self.config = before

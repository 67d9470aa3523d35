"""One rank's bad input becomes the same error on every rank, so that none is left waiting."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def same_error_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Wait for all ranks at the end of the block; if it failed on any, raise on all.

    Every rank must enter it. Covers ValueError, TypeError, RuntimeError and OSError.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError) as caught:
        error = caught
    raise_same_error(error, group)


def raise_same_error(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Exchange what went wrong on each rank of `group`; raise the lowest rank's error on all.

    Returns if nothing went wrong anywhere. Every rank must call it.
    """
    mine = None if error is None else (type(error).__name__, str(error))
    reports = gather_objects(mine, group)
    for rank, report in enumerate(reports):
        if report is not None:
            name, message = report
            kind = {"TypeError": TypeError, "ValueError": ValueError}.get(name, RuntimeError)
            where = f"rank {rank}: " if len(set(reports)) > 1 else ""
            raise kind(where + message) from error


def raise_differences(settings: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Raise ValueError on all ranks of `group` if any of the named settings differ between them.

    Returns if all are equal. Every rank must call it.
    """
    everyone = gather_objects({name: str(value) for name, value in settings.items()}, group)
    differing = [
        f"{name} ("
        + ", ".join(f"rank {rank}: {one.get(name)}" for rank, one in enumerate(everyone))
        + ")"
        for name in settings
        if len({one.get(name) for one in everyone}) > 1
    ]
    if differing:
        raise ValueError(f"ranks must agree, but do not, on {'; '.join(differing)}")


def gather_objects(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank of `group` gives, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone

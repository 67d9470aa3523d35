"""Raising one rank's error on every rank, so that no rank waits for one that has failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist


@contextmanager
def same_error_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Wait for all ranks at the end of the block; if the block failed on any, raise on all.

    Collective over `group` (None: all ranks). Covers ValueError, TypeError, RuntimeError and
    OSError; any other exception leaves the other ranks waiting until the group's timeout.

    Raises:
        ValueError, TypeError, RuntimeError: see `raise_same_error`.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError) as caught:
        error = caught
    raise_same_error(error, group)


def raise_same_error(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Exchange the errors of all ranks of `group`; raise that of the lowest failed rank on all.

    Collective over `group` (None: all ranks); returns if `error` is None on every rank.

    Raises:
        ValueError, TypeError, RuntimeError: the kind of the error raised, RuntimeError for any
            other kind. The message names the rank, unless all ranks failed alike.
    """
    mine = error and (type(error).__name__, reason_in(error))
    reports = gather_objects(mine, group)
    for rank, report in enumerate(reports):
        if report is not None:
            name, message = report
            kind = {"TypeError": TypeError, "ValueError": ValueError}.get(name, RuntimeError)
            where = f"rank {rank}: " if len(set(reports)) > 1 else ""
            raise kind(where + message) from error


def reason_in(error: BaseException) -> str:
    """Return the message of an error, or its type if it has none."""
    return str(error) or type(error).__name__


def raise_differences(settings: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Raise an error on all ranks of `group` if any setting differs between them.

    Collective over `group` (None: all ranks).

    Args:
        settings: values by name, the same names on all ranks; compared as text.

    Raises:
        ValueError: lists each differing setting with its value on every rank.
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
        raise ValueError(f"ranks must agree on {'; '.join(differing)}")


def gather_objects(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Gather a picklable object from every rank of `group`; returns them in order of rank.

    A process without a process group is the only rank.
    """
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


class RankAndSize(NamedTuple):
    """Rank of this process, and how many ranks there are."""

    rank: int
    world_size: int


def rank_and_size() -> RankAndSize:
    """Return this process's rank and the number of ranks; 0 and 1 without a process group."""
    if not dist.is_initialized():
        return RankAndSize(rank=0, world_size=1)
    return RankAndSize(dist.get_rank(), dist.get_world_size())

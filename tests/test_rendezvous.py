"""Ranks find each other, whatever dead ones have left in the store."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from flash_moe_dist.rendezvous import store_of_this_attempt, store_on_loopback

SOON = timedelta(seconds=1)
WORLD_SIZE = 3


@pytest.fixture
def store() -> Any:
    shared: Any = dist
    return shared.HashStore()


def attempt(store: Any, ranks: Iterator[int] | range, timeout: timedelta = SOON) -> list[Any]:
    """Join with `ranks` alone; return the store, or the error, that each of them gets."""

    def one(rank: int) -> Any:
        try:
            return store_of_this_attempt(store, rank, WORLD_SIZE, timeout)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(WORLD_SIZE) as threads:
        return list(threads.map(one, ranks))


def assert_one_and_its_own(stores: list[Any]) -> None:
    stores[0].set("address", "of rank 0")
    for one in stores:
        assert one.get("address") == b"of rank 0"


def test_each_attempt_has_a_part_of_the_store_to_itself(store: Any) -> None:
    first = attempt(store, range(WORLD_SIZE))
    assert_one_and_its_own(first)
    for _ in range(20):
        again = attempt(store, range(WORLD_SIZE))
        assert not again[1].check(["address"])
        assert_one_and_its_own(again)


@pytest.mark.parametrize("came", [(0,), (1,), (0, 1), (1, 2), (0, 2)])
def test_after_an_attempt_to_which_not_all_came(store: Any, came: tuple[int, ...]) -> None:
    """The second time, the store also holds what a whole attempt has left."""
    for _ in range(2):
        for error in attempt(store, iter(came), timedelta(seconds=0.2)):
            assert isinstance(error, RuntimeError)
            assert str(error) == "all 3 ranks must join within 0.2 s, but not all did"
        assert_one_and_its_own(attempt(store, range(WORLD_SIZE)))


def test_fewer_ranks_than_before(store: Any) -> None:
    attempt(store, range(WORLD_SIZE))
    alone = store_of_this_attempt(store, 0, 1, SOON)
    assert not alone.check(["address"])


def test_a_store_of_one_machine_listens_on_the_loopback_only() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ThreadPoolExecutor(WORLD_SIZE) as threads:
        stores = list(
            threads.map(
                lambda rank: store_on_loopback(port, rank, WORLD_SIZE, timedelta(seconds=20)),
                range(WORLD_SIZE),
            )
        )
    assert_one_and_its_own(stores)
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    ]
    assert listening == [f"0100007F:{port:04X}"]

"""A store that holds nothing of the processes that torchrun started before these.

torchrun restarts processes, but keeps the store through which they find each other: a process can
read there the address of one that is dead. Nothing that it tells them is new in each attempt and
the same on all nodes; its count of restarts is each node's own. So the ranks agree on a name:

    every rank      writes a random name of its own
    rank 0          proposes a name for the attempt, with the names of all ranks as it finds them;
                    again when one of these changes, as it was a dead process's
    every rank      answers a proposal that has its own name
    rank 0          closes the proposal that all have answered

Whatever is in the store under the attempt's name is then of this attempt's processes.
"""

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

POLL_SECONDS = 0.02


def store_of_this_attempt(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of `store` that is this attempt's own; every rank must call it.

    Args:
        store: shared by all ranks, and by those of earlier attempts.
        timeout: how long to wait for the other ranks.

    Raises:
        RuntimeError: not all of `world_size` ranks have come.
    """
    store = PrefixStore("flash_moe_dist", store)
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(_name_key(rank), mine)
    names: list[str] = []
    attempt = answered = ""
    while time.monotonic() < deadline:
        if rank == 0:
            found = _names_of_all(store, world_size)
            if found and found != names:
                names, attempt = found, uuid.uuid4().hex
                store.set("proposal", json.dumps([attempt, names]))
            if attempt and store.check([_answer_key(attempt, one) for one in range(world_size)]):
                store.set(_closed_key(attempt), "")
        if store.check(["proposal"]):
            proposed, proposed_names = json.loads(store.get("proposal"))
            if proposed != answered and proposed_names[rank : rank + 1] == [mine]:
                store.set(_answer_key(proposed, rank), "")
                answered = proposed
        if answered and store.check([_closed_key(answered)]):
            return PrefixStore(answered, store)
        time.sleep(POLL_SECONDS)
    raise RuntimeError(
        f"all {world_size} ranks must come within {timeout.total_seconds():g} s, not all did"
    )


def _names_of_all(store: Store, world_size: int) -> list[str]:
    keys = [_name_key(rank) for rank in range(world_size)]
    return [name.decode() for name in store.multi_get(keys)] if store.check(keys) else []


def _name_key(rank: int) -> str:
    return f"name of {rank}"


def _answer_key(attempt: str, rank: int) -> str:
    return f"{attempt} answered by {rank}"


def _closed_key(attempt: str) -> str:
    return f"{attempt} closed"

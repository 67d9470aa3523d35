"""Rendezvous stores: of one attempt, free of entries that earlier ones have left; of one machine.

When torchrun restarts the processes it keeps the store through which they find each other, so a
process could read there the address of one that is dead. No variable that torchrun sets is both
new in each attempt and equal on all nodes: restarts are counted on each node separately. So the
ranks agree on a name for the attempt:

    every rank      writes a random id of its own
    rank 0          proposes an attempt name, along with the ids of all ranks as it reads them;
                    proposes again when one changes, because the old id was a dead process's
    every rank      answers a proposal that contains its own id
    rank 0          closes the proposal when all ranks have answered

Keys prefixed with the attempt's name are then written by this attempt's processes only.
"""

import json
import socket
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

POLL_SECONDS = 0.02


def store_of_this_attempt(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Agree with all ranks on a key prefix of `store` that this attempt alone uses; collective.

    Args:
        store: shared by all ranks, and with the processes of earlier attempts.
        rank: rank of this process, 0 to `world_size` - 1.
        world_size: number of ranks that must join.
        timeout: how long to wait for the other ranks.

    Returns:
        `store` with the prefix added to every key.

    Raises:
        RuntimeError: fewer than `world_size` ranks have joined within `timeout`.
    """
    store = PrefixStore("flash_moe_dist", store)
    own_id, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(_id_key(rank), own_id)
    ids: list[str] = []
    attempt = answered = ""
    while time.monotonic() < deadline:
        if rank == 0:
            found = _ids_of_all(store, world_size)
            if found and found != ids:
                ids, attempt = found, uuid.uuid4().hex
                store.set("proposal", json.dumps([attempt, ids]))
            if attempt and store.check([_answer_key(attempt, one) for one in range(world_size)]):
                store.set(_closed_key(attempt), "")
        if store.check(["proposal"]):
            proposed, proposed_ids = json.loads(store.get("proposal"))
            if proposed != answered and proposed_ids[rank : rank + 1] == [own_id]:
                store.set(_answer_key(proposed, rank), "")
                answered = proposed
        if answered and store.check([_closed_key(answered)]):
            return PrefixStore(answered, store)
        time.sleep(POLL_SECONDS)
    raise RuntimeError(
        f"all {world_size} ranks must join within {timeout.total_seconds():g} s, but not all did"
    )


def store_on_loopback(port: int, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Create a store that only processes of this machine can reach; collective.

    A TCPStore that opens its own socket listens on all addresses, and trusts whoever connects.

    Args:
        port: free on the loopback, the same on all ranks.
        rank: rank of this process; rank 0 serves the store.
        world_size: number of ranks.
        timeout: how long to wait for the other ranks.
    """
    address = "127.0.0.1"
    if rank != 0:
        return TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    # The store closes the socket.
    listening = socket.create_server((address, port)).detach()
    return TCPStore(
        address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listening
    )


def _ids_of_all(store: Store, world_size: int) -> list[str]:
    """Ids by rank; empty until every rank has written one."""
    keys = [_id_key(rank) for rank in range(world_size)]
    return [one.decode() for one in store.multi_get(keys)] if store.check(keys) else []


def _id_key(rank: int) -> str:
    return f"id of {rank}"


def _answer_key(attempt: str, rank: int) -> str:
    return f"{attempt} answered by {rank}"


def _closed_key(attempt: str) -> str:
    return f"{attempt} closed"

"""The order of passes over a group, and the error if it is another one on some rank.

A forward pass sends a checksum of its `PassIdentity` in its header, so that all ranks notice in the
same exchange. A backward pass has no header: it is told in the identity of the next forward pass,
or at the end of the run. Until then, ranks in different passes may wait for each other: one, say,
for the header of a forward pass that another has skipped. So where the host waits for collectives
(gloo), a rank that has waited for `SECONDS_BEFORE_COMPARISON` writes the name of its pass to the
store of the group, and compares it with what other waiting ranks have written.
"""

import time
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist

from flash_moe_dist.agreement import raise_differences

SECONDS_BEFORE_COMPARISON = 3.0
SECONDS_BETWEEN_COMPARISONS = 0.5
# How long a rank that has found a difference waits for the names of ranks that come later.
MAX_SECONDS_FOR_ALL_NAMES = 5.0
BACKWARD_PASSES = "the backward passes since the last forward pass"


class PassIdentity(NamedTuple):
    """Which forward pass a rank makes, so that it never meets another layer's on other ranks.

    layer: name of the layer among those of its group.
    call: forward passes of the layer that came before.
    backward: backward passes of all layers of the group since their last forward pass, in order,
        as `name` of their forward passes.
    """

    layer: str
    call: int
    backward: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"call {self.call} of {self.layer}"

    def by_name(self) -> dict[str, Any]:
        """What all ranks must share, by the names that an error gives it."""
        return {"the layer that is called": self.name, BACKWARD_PASSES: list(self.backward)}


class GroupPasses:
    """What a rank notes of the passes of all layers of a group.

    failures: passes with static capacity that ended in an error. Ranks may have called different
        layers in these, so no plan made before is known to be the same on all of them.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._backward: list[str] = []
        # Passes in both directions that this rank has begun, and the name of the last.
        self._begun = 0
        self._name = ""
        # Passes whose names this rank has written last, and before that.
        self._written = self._before_written = 0

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "GroupPasses":
        return _passes_of_groups.setdefault(group, cls())

    def begin_forward(self, layer: str, call: int) -> PassIdentity:
        """Note that a forward pass begins; return its identity."""
        identity = PassIdentity(layer, call, self.take_backward())
        self._begin(identity.name)
        return identity

    def begin_backward(self, name: str) -> None:
        """Note that the backward pass begins of the forward pass whose identity has that name."""
        self._backward.append(name)
        self._begin(f"backward pass of {name}")

    def begin_sums(self) -> None:
        """Note that a router begins to add up its statistics over the ranks."""
        self._begin("statistics of a router")

    def begin_end(self) -> None:
        """Note that no more passes will be made."""
        self._begin("the end")

    def take_backward(self) -> tuple[str, ...]:
        """Return the names of the backward passes since the last call, and forget them."""
        taken = tuple(self._backward)
        self._backward.clear()
        return taken

    def _begin(self, name: str) -> None:
        self._begun += 1
        self._name = name

    def compare(self, group: dist.ProcessGroup) -> None:
        """Compare the pass of this rank with those of ranks that have called this for theirs.

        Raises:
            ValueError: another rank is in another pass.
        """
        names = self._write_and_read(group)
        if len(set(names.values())) == 1:
            return
        end = time.monotonic() + MAX_SECONDS_FOR_ALL_NAMES
        while len(names) < dist.get_world_size(group) and time.monotonic() < end:
            time.sleep(SECONDS_BETWEEN_COMPARISONS)
            names = self._write_and_read(group)
        listed = ", ".join(f"rank {rank}: {name}" for rank, name in names.items())
        raise ValueError(f"ranks must agree on the pass that they make ({listed})")

    def _write_and_read(self, group: dist.ProcessGroup) -> dict[int, str]:
        """Write the name of this rank's pass to the store; return all names there, by rank."""
        store, rank = group.get_group_store(), dist.get_rank(group)
        keys = [_key(self._begun, one) for one in range(dist.get_world_size(group))]
        if self._written != self._begun:
            store.set(keys[rank], self._name)
            # Others may still have to read the one before, but none before that.
            store.delete_key(_key(self._before_written, rank))
            self._before_written, self._written = self._written, self._begun
        return {one: store.get(key).decode() for one, key in enumerate(keys) if store.check([key])}


def _key(number: int, rank: int) -> str:
    return f"pass {number} of rank {rank}"


_passes_of_groups: WeakKeyDictionary[dist.ProcessGroup, GroupPasses] = WeakKeyDictionary()


def host_waits(group: dist.ProcessGroup, is_cuda: bool) -> bool:
    """Whether the host waits for a collective over tensors, on a GPU or not, and not the device."""
    return not is_cuda and "gloo" in dist.get_backend(group)


def wait_for_collective(work: dist.Work, group: dist.ProcessGroup) -> None:
    """Wait for a collective for which the host waits.

    Raises:
        RuntimeError: the collective failed, or took longer than the timeout of the group.
        ValueError: the ranks wait in different passes.
    """
    seconds = SECONDS_BEFORE_COMPARISON
    while not _is_completed_within(work, seconds):
        GroupPasses.of(group).compare(group)
        seconds = SECONDS_BETWEEN_COMPARISONS


def _is_completed_within(work: dist.Work, seconds: float) -> bool:
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        # Completed since then, or failed: then this raises the error of the collective.
        work.wait()
    return True


def check_backward_passes(group: dist.ProcessGroup) -> None:
    """Check backward passes that no forward pass has followed. Collective over `group`.

    Raises:
        ValueError: on every rank alike, if the ranks made other backward passes or another order,
            or some rank is still in a pass.
    """
    passes = GroupPasses.of(group)
    made = passes.take_backward()
    passes.begin_end()
    if host_waits(group, is_cuda=False):
        wait_for_collective(dist.barrier(group, async_op=True), group)
    raise_differences({BACKWARD_PASSES: list(made)}, group)

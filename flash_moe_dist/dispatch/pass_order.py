"""The order of passes over a group, and what happens if it is another one on some rank.

A forward pass sends a checksum of its `PassIdentity` in its header, so that all ranks notice in the
same exchange. A backward pass has no header: it is told in the identity of the next forward pass,
or at the end of the run. Until then, ranks in different passes may wait for each other: one, say,
for the header of a forward pass that another has skipped. So a rank of gloo, where the host waits
for every collective, writes the name of its pass to the store of the group once it has waited for
`SECONDS_BEFORE_COMPARISON`, and compares it with what other waiting ranks have written.
"""

import time
from dataclasses import dataclass
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


@dataclass
class GroupPasses:
    """What a rank notes of the passes of all layers of a group.

    failures: passes with static capacity that ended in an error. Ranks may have called different
        layers in these, so no plan made before is known to be the same on all of them.
    """

    failures: int = 0

    def __post_init__(self) -> None:
        self._backward: list[str] = []
        # Passes in both directions that this rank has begun, and the name of the last.
        self._begun = 0
        self._name = ""

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
        own = self._write_and_read(group)
        if len(set(own.values())) == 1:
            return
        end = time.monotonic() + MAX_SECONDS_FOR_ALL_NAMES
        while len(own) < dist.get_world_size(group) and time.monotonic() < end:
            time.sleep(SECONDS_BETWEEN_COMPARISONS)
            own = self._write_and_read(group)
        listed = ", ".join(f"rank {rank}: {name}" for rank, name in own.items())
        raise ValueError(f"ranks must agree on the pass that they make ({listed})")

    def _write_and_read(self, group: dist.ProcessGroup) -> dict[int, str]:
        """Write the name of this rank's pass to the store; return all names there, by rank."""
        store = group.get_group_store()
        keys = [f"pass {self._begun} of rank {rank}" for rank in range(dist.get_world_size(group))]
        store.set(keys[dist.get_rank(group)], self._name)
        return {
            rank: store.get(key).decode() for rank, key in enumerate(keys) if store.check([key])
        }


_passes_of_groups: WeakKeyDictionary[dist.ProcessGroup, GroupPasses] = WeakKeyDictionary()


def wait_for_collective(work: dist.Work, group: dist.ProcessGroup) -> None:
    """Wait on the host for a collective of gloo.

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
    if dist.get_backend(group) == "gloo":
        wait_for_collective(dist.barrier(group, async_op=True), group)
    raise_differences({BACKWARD_PASSES: list(made)}, group)

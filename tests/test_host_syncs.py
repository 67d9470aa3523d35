"""Number of times that a pass of the sharded layer waits for the device."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import make_case
from ranks import RankPools, rank_device
from sharded import shard_experts
from torch import Tensor

from flash_moe_dist import count_load
from flash_moe_dist.dispatch.collectives import ALL_GATHER_COLLECTIVE, ALL_TO_ALL_COLLECTIVE


def host_syncs_of(run: Callable[[], Any]) -> list[str]:
    """Lines that wait for the device in `run`, as PyTorch sees it, but those inside collectives.

    gloo waits for the device to copy tensors to the host and back; nccl does not. Waits for an
    event count, too.
    """
    torch.cuda.synchronize()
    awaited: list[str] = []
    wait_for_event = torch.cuda.Event.synchronize

    def waiting(event: torch.cuda.Event) -> None:
        caller = sys._getframe(1)
        awaited.append(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
        wait_for_event(event)

    def uncounted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            done = collective(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("warn")
            return done

        return call

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        patch.setattr(torch.cuda.Event, "synchronize", waiting)
        if dist.get_backend() == "gloo":
            for name in (ALL_TO_ALL_COLLECTIVE, ALL_GATHER_COLLECTIVE):
                patch.setattr(dist, name, uncounted(getattr(dist, name)))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return awaited + [
        f"{Path(one.filename).name}:{one.lineno}"
        for one in caught
        if "called a synchronizing" in str(one.message)
    ]


def host_syncs(dispatcher: str) -> list[list[str]]:
    """Host syncs of a forward pass, of a backward pass, and of one with a sync put into it."""
    case = make_case(64, 12, 23, 5, device=rank_device())
    experts = shard_experts(case, dispatcher)
    rows = (case.hidden_states, case.indices, case.routing_weights)
    # Compiles kernels.
    experts(*rows).backward(case.grad)
    out: list[Tensor] = []
    forward = host_syncs_of(lambda: out.append(experts(*rows)))
    backward = host_syncs_of(lambda: out[0].backward(case.grad))
    out = [experts(*rows)]

    def waits(grad: Tensor) -> None:
        grad.sum().item()

    case.hidden_states.register_hook(waits)
    return [forward, backward, host_syncs_of(lambda: out[0].backward(case.grad))]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "gloo on cuda"])
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_one_host_sync_in_forward_and_none_in_backward(
    dispatcher: str, backend: str, rank_pools: RankPools
) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    for syncs in rank_pools.run(2, host_syncs, dispatcher, backend=backend):
        assert [len(lines) for lines in syncs] == [1, 0, 1], syncs


READS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")


def reads_on_the_host(run: Callable[[], Any]) -> list[str]:
    """Lines of flash_moe_dist that read values of a tensor in `run`, on whatever device."""
    lines: list[str] = []

    def reading(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            module = caller.f_globals["__name__"]
            if module.split(".")[0] == "flash_moe_dist":
                lines.append(f"{module}:{caller.f_lineno} {name}")
            return method(*args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, reading(name, getattr(Tensor, name)))
        run()
    return lines


def reads(dispatcher: str) -> list[list[str]]:
    case = make_case(64, 12, 23, 5)
    experts = shard_experts(case, dispatcher)
    out: list[Tensor] = []
    rows = (case.hidden_states, case.indices, case.routing_weights)
    forward = reads_on_the_host(lambda: out.append(experts(*rows)))
    return [forward, reads_on_the_host(lambda: out[0].backward(case.grad))]


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_one_line_reads_what_another_rank_sent(dispatcher: str, rank_pools: RankPools) -> None:
    """Without a GPU, count reads of values on the host, the syncs that show there."""
    for forward, backward in rank_pools.run(2, reads, dispatcher):
        # That the forward pass has one shows that reads of the package are seen at all.
        assert len(forward) == 1, forward
        assert not backward, backward


def syncs_while_counting() -> list[str]:
    case = make_case(64, 12, 23, 5, device=rank_device())
    experts = shard_experts(case)
    rows = (case.hidden_states, case.indices, case.routing_weights)
    experts(*rows)
    with count_load(experts):
        return host_syncs_of(lambda: experts(*rows))


@pytest.mark.gpu
def test_counting_the_load_adds_no_sync_to_a_pass(rank_pools: RankPools) -> None:
    for lines in rank_pools.run(2, syncs_while_counting, backend="gloo on cuda"):
        assert len(lines) == 1, lines

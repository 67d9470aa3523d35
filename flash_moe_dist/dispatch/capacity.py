"""Dispatch with static capacity: try a pass in buffers of known sizes, confirm, else exact counts.

W ranks, T local tokens, K experts per token, H hidden size, X most tokens of any rank, F header
fields.

A rank must know how many pairs it gets before it can receive them. The first pass of a layer
exchanges counts, and the host waits for them before it launches anything else. Where every rank
gets all rows, these counts give a plan for later passes: buffers for X tokens of each rank, and for
an eighth more pairs, plus 16, than any rank sent to any other. In a planned pass the headers travel
in front of the pairs, and the host reads them after it has launched the whole pass. If they show
that every rank's part fits, the pass is confirmed. Otherwise its result is thrown away and the pass
runs again with exact counts: no pair is ever dropped.

A plan also stops fitting when X shrinks. The buffers would hold such a pass, but kernels choose
their tiles by X, so its result would not be bitwise equal to that with exact counts.

All ranks have the same plan, as it follows from counts that all have seen. A rank whose own input
does not fit the plan, or is wrong, stands in: it takes the same path with no tokens, so that no
rank waits for it, and its header tells the others why.

What a confirmed pass saves for the backward pass has the size of the buffers, so up to MAX_PADDING
times what the pairs need where the load is uneven.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.overlap import Outputs, wait_for_rows
from flash_moe.ops.pairs import SavedPairs
from flash_moe.ops.side_stream import SideStream
from flash_moe_dist.dispatch.base import (
    Dispatched,
    Dispatcher,
    DispatchMetadata,
    ReceivedTokens,
    expected_pairs_per_row,
)
from flash_moe_dist.dispatch.comm_volume import DispatcherName
from flash_moe_dist.dispatch.exact import DISPATCHERS, AllGatherDispatcher, ExactDispatcher
from flash_moe_dist.dispatch.handshake import PassCounts, RankInput, Splits
from flash_moe_dist.dispatch.header import TOKENS_DO_NOT_FIT, Header
from flash_moe_dist.dispatch.message import (
    CapacityLayout,
    MetadataTensors,
    header_of,
    pack_into,
    unpack_from,
)
from flash_moe_dist.dispatch.pass_order import GroupPasses, PassIdentity
from flash_moe_dist.dispatch.symmetric import SymmetricDispatcher, buffer_bytes
from flash_moe_dist.dispatch.symmetric_memory import (
    check_symmetric_memory,
    symmetric_buffers,
    timeout_seconds,
)
from flash_moe_dist.phases import phase

Transport = Literal["auto", "nccl", "symmetric_memory"]
# No plan where the load is so uneven that messages would be mostly padding.
MAX_PADDING = 2
# A pass that runs twice takes as long as this many confirmed passes save.
MIN_HITS_TO_AMORTIZE_RETRY = 4
MAX_BACKOFF_PASSES = 63


@dataclass
class DispatchStats:
    """Forward passes of a layer on this rank, by the way they took.

    exact: passes with exact counts, retries included.
    capacity: passes with static capacity that were confirmed.
    retried: passes with static capacity that were thrown away, as another rank's part did not fit
        or the capacity did not suffice; without those in which this rank stood in.
    stood_in: passes with static capacity in which this rank took part without tokens, as its own
        input did not fit or was wrong.
    transports: passes in `exact` and `capacity` by what carried their rows: the backend of the
        process group ("nccl", "gloo") or "symmetric_memory".
    dispatchers: the same passes by dispatcher, "all_to_all" or "all_gather".
    """

    exact: int = 0
    capacity: int = 0
    retried: int = 0
    stood_in: int = 0
    transports: Counter[str] = field(default_factory=Counter)
    dispatchers: Counter[str] = field(default_factory=Counter)

    def count(self, dispatcher: Dispatcher) -> None:
        """Count a pass by its transport and its dispatcher."""
        self.transports[dispatcher.transport] += 1
        self.dispatchers[dispatcher.name] += 1


@dataclass(frozen=True)
class CapacityPlan:
    """Sizes of the buffers of a pass, and all that they depend on.

    layout: layout of the messages.
    sizes: `SharedSettings.sizes` of the passes that it is for.
    num_experts, top_k, hidden_size, hidden_dtype: E, K, H and dtype in these passes.
    sum_dtype: dtype of partial sums.
    dispatcher: what sends the buffers.
    timeout: how long a collective may take, in seconds.
    """

    layout: CapacityLayout
    sizes: dict[str, Any]
    num_experts: int
    top_k: int
    hidden_size: int
    hidden_dtype: torch.dtype
    sum_dtype: torch.dtype
    dispatcher: AllGatherDispatcher
    timeout: float

    @classmethod
    def from_counts(
        cls,
        inp: RankInput,
        counts: PassCounts,
        dispatcher: AllGatherDispatcher,
        transport: Transport,
    ) -> "CapacityPlan | None":
        """Plan for passes like the one that was just counted; None if static capacity does not pay.

        Collective. Planned passes go by `dispatcher`, which made the counted pass, or over
        symmetric memory.

        Raises:
            RuntimeError: on every rank alike, if `transport` asks for symmetric memory and the
                ranks cannot have it.
        """
        assert inp.shared is not None
        group, ep_size = dispatcher.group, dispatcher.ep_size
        hidden_size, top_k = inp.hidden_TH.shape[1], inp.indices_TK.shape[1]
        possible_pairs = counts.max_tokens * top_k
        max_pairs = min(possible_pairs, counts.max_pairs + counts.max_pairs // 8 + 16)
        if not inp.in_kernels or possible_pairs == 0:
            return None
        if ep_size * max_pairs > MAX_PADDING * possible_pairs:
            return None
        layout = CapacityLayout(counts.max_tokens, max_pairs, inp.weights_TK.dtype)
        if hidden_size > 0 and transport != "nccl":
            row_bytes = hidden_size * inp.hidden_TH.dtype.itemsize
            sum_bytes = hidden_size * inp.sum_dtype.itemsize
            sizes = buffer_bytes(layout, ep_size, row_bytes, sum_bytes)
            required = transport == "symmetric_memory"
            buffers = symmetric_buffers(group, inp.device, sizes, required)
            if buffers is not None:
                dispatcher = SymmetricDispatcher(group, buffers)
                # The first call for a stride waits for the device, which no later pass should do.
                dispatcher.message_pointers(layout.message_stride)
        return cls(
            layout=layout,
            sizes=inp.shared.sizes,
            num_experts=inp.num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            hidden_dtype=inp.hidden_TH.dtype,
            sum_dtype=inp.sum_dtype,
            dispatcher=dispatcher,
            timeout=timeout_seconds(group, inp.device),
        )

    def accepts(self, inp: RankInput) -> bool:
        """Whether this rank's part of a pass fits, as far as this rank can know."""
        return (
            inp.shared is not None
            and inp.shared.sizes == self.sizes
            and inp.hidden_TH.shape[0] <= self.layout.padded_tokens
        )

    def covers(self, counts: PassCounts) -> bool:
        """Whether all ranks' parts fit, and X is the one that the plan is for."""
        return (
            counts.all_fit
            and counts.max_pairs <= self.layout.max_pairs
            and counts.max_tokens == self.layout.padded_tokens
        )

    def dispatch(self, inp: RankInput) -> "ProvisionalPass":
        """Dispatch in buffers of static capacity; with no tokens if the plan does not accept `inp`.

        No host sync: the headers of all ranks are on their way to the host.
        """
        layout, dispatcher, device = self.layout, self.dispatcher, inp.device
        stands_in = not self.accepts(inp)
        sent = self._without_tokens(inp) if stands_in else inp
        ep_size = dispatcher.ep_size
        rows_of_each = [layout.padded_tokens] * ep_size
        metadata = DispatchMetadata(
            rows=Splits(rows_of_each, rows_of_each),
            pairs=None,
            num_tokens=sent.hidden_TH.shape[0],
            max_tokens=layout.padded_tokens,
            shape_TK=sent.indices_TK.shape,
        )
        # With NCCL these travel while pairs are sorted and packed.
        rows = dispatcher.send_rows(sent.hidden_TH, metadata)
        message_WL = dispatcher.message_buffer(layout, device)
        header_2WF = torch.empty(2, ep_size, len(Header), device=device, dtype=torch.int64)
        routing = sent.routing(ep_size)
        routing.write_header(
            header_2WF[0], sent.checksum, count_rows=False, copy_WF=header_of(message_WL)
        )
        if stands_in and inp.error is None:
            for header_WF in (header_2WF[0], header_of(message_WL)):
                header_WF[:, Header.TOKENS] = TOKENS_DO_NOT_FIT
        packed = pack_into(message_WL, routing, sent.weights_TK, layout)
        messages = dispatcher.exchange_messages(message_WL)
        unpacked = unpack_from(messages, header_2WF[1], layout, sent.checksum)
        rows.start_transfer()
        tile_pairs = expected_pairs_per_row(self.top_k, ep_size)
        received = ReceivedTokens.from_unpacked(rows, unpacked, tile_pairs)
        metadata = metadata.with_tensors(packed.tensors)
        return ProvisionalPass(
            dispatched=Dispatched(received, metadata, dispatcher),
            plan=self,
            stands_in=stands_in,
            header_2WF=header_2WF,
            host=_copy_to_host(header_2WF),
        )

    def _without_tokens(self, inp: RankInput) -> RankInput:
        """Input of no tokens in the shapes and dtypes of the plan, with the checksum of `inp`."""
        return replace(
            inp,
            hidden_TH=torch.empty(0, self.hidden_size, device=inp.device, dtype=self.hidden_dtype),
            indices_TK=torch.empty(0, self.top_k, device=inp.device, dtype=torch.int64),
            weights_TK=torch.empty(
                0, self.top_k, device=inp.device, dtype=self.layout.weight_dtype
            ),
            num_experts=self.num_experts,
            in_kernels=True,
        )


class _HeadersOnHost(NamedTuple):
    """Headers (2, W, F), sent and received; in host memory once `copied` is reached."""

    header_2WF: Tensor
    copied: torch.cuda.Event | None


@dataclass(frozen=True)
class ProvisionalPass:
    """A dispatch whose result counts only once the headers of all ranks confirm it.

    stands_in: this rank took part without tokens.
    header_2WF: headers sent and received, on the device; held until they are copied to the host.
    """

    dispatched: Dispatched
    plan: CapacityPlan
    stands_in: bool
    header_2WF: Tensor
    host: _HeadersOnHost

    def wait_for_headers(self) -> tuple[list[list[int]], list[list[int]]]:
        """Headers sent and received, (W, F) each. A host sync."""
        if self.host.copied is not None:
            wait_for_event(self.host.copied, self.plan.timeout)
        sent_WF, received_WF = self.host.header_2WF.tolist()
        return sent_WF, received_WF


class CompletedPass(NamedTuple):
    """Output (T, H) of a forward pass, and what its backward pass needs.

    saved: what the experts returned.
    """

    out_TH: Tensor
    saved: SavedPairs | None
    received: ReceivedTokens
    metadata: DispatchMetadata
    dispatcher: Dispatcher


# Computes the experts of the tokens received into the outputs, and returns what to save; None where
# nothing but zeros was written.
Experts = Callable[[ReceivedTokens, Outputs], SavedPairs | None]


class LayerDispatch:
    """Runs the forward passes of one layer over the ranks of `group`.

    All ranks decide alike when to make a plan, from counts that all have seen. Where plans are
    seldom confirmed, because sizes change all the time, more and more passes with exact counts
    go by before the next plan.

    Args:
        group: the expert-parallel ranks.
        name: tells this layer from others of the group; the same on all ranks.
        transport: what carries rows and sums.
        has_capacity: make passes with static capacity.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        name: str,
        transport: Transport = "auto",
        has_capacity: bool = True,
    ) -> None:
        self.group, self.name = group, name
        self.transport, self.has_capacity = transport, has_capacity
        self.stats = DispatchStats()
        self.group_passes = GroupPasses.of(group)
        # `GroupPasses.failures` when the plan was made.
        self._failures = 0
        # Forward passes that all ranks have made together.
        self._calls = 0
        self.plan: CapacityPlan | None = None
        # Exact passes to make before the next plan, those made, and confirmed passes of this plan.
        self._backoff = self._exact_passes = self._hits = 0
        self._dispatchers: dict[DispatcherName, ExactDispatcher] = {}

    def next_pass(self) -> PassIdentity:
        """Identity of the forward pass that follows; call it once for each `run`."""
        return self.group_passes.begin_forward(self.name, self._calls)

    def run(self, inp: RankInput, name: DispatcherName, experts: Experts) -> CompletedPass:
        """Dispatch, run the experts, and combine: with static capacity if that is confirmed.

        Collective; at most two attempts. A rank with wrong input takes part without tokens.

        Args:
            inp: this rank's part.
            name: the dispatcher of a pass with exact counts.
            experts: called once for each attempt in which this rank takes part with its tokens.

        Raises:
            TypeError, ValueError: on every rank alike, if any rank's input is wrong, the ranks'
                settings differ, or they do not call the same layer.
            RuntimeError: on every rank alike, if symmetric memory is asked for and cannot be had;
                or the device failed, perhaps because a rank did not come in time.
        """
        if self.transport == "symmetric_memory":
            inp = self._check_symmetric_memory(inp)
        if self._failures != self.group_passes.failures:
            self.plan = None
        if self.plan is not None:
            completed = self._try_capacity(self.plan, inp, experts)
            if completed is not None:
                return completed
        with phase("dispatch"):
            dispatcher = self._dispatcher(name)
            dispatched, counts = dispatcher.dispatch(inp)
            self._calls += 1
            self.stats.exact += 1
            self.stats.count(dispatcher)
            self._plan_next_passes(inp, counts, dispatcher)
        out_TH, saved = _compute(dispatched, inp.sum_dtype, experts)
        return _completed(out_TH, saved, dispatched)

    def fail(self, error: Exception, device: torch.device) -> NoReturn:
        """Raise `error` on every rank, in place of a pass that this rank cannot make."""
        self.next_pass()
        self.run(RankInput(device, error), "all_to_all", _write_zeros)
        raise AssertionError("an error of this rank was not raised")

    def _check_symmetric_memory(self, inp: RankInput) -> RankInput:
        """Check, before anything is sent, that the transport can be had; `inp`, or an error in it.

        Collective.
        """
        check_symmetric_memory(self.group, inp.device)
        if inp.shared is None or inp.in_kernels:
            return inp
        error = RuntimeError(
            "transport 'symmetric_memory' needs a Triton backend, got backend "
            f"{inp.shared.sizes['backend']!r}"
        )
        return RankInput(inp.device, error)

    def _try_capacity(
        self, plan: CapacityPlan, inp: RankInput, experts: Experts
    ) -> CompletedPass | None:
        """Make the pass with static capacity; None, with nothing left of it, if it does not fit."""
        with phase("dispatch"):
            attempt = plan.dispatch(inp)
        attempted = _write_zeros if attempt.stands_in else experts
        out_TH, saved = _compute(attempt.dispatched, plan.sum_dtype, attempted)
        metadata = self._confirm(inp, attempt)
        if metadata is None:
            return None
        self._calls += 1
        return _completed(out_TH, saved, replace(attempt.dispatched, metadata=metadata))

    def _dispatcher(self, name: DispatcherName) -> ExactDispatcher:
        if name not in self._dispatchers:
            self._dispatchers[name] = DISPATCHERS[name](self.group)
        return self._dispatchers[name]

    def _confirm(self, inp: RankInput, attempt: ProvisionalPass) -> DispatchMetadata | None:
        """Wait for the headers of all ranks; the complete metadata, or None if any does not fit.

        Gives the plan up in the latter case.
        """
        self.stats.stood_in += attempt.stands_in
        self.plan = None
        headers = attempt.wait_for_headers()
        # Until all ranks are known to have called this layer.
        self.group_passes.failures += 1
        counts = inp.agreed_counts(*headers, self.group)
        self.group_passes.failures -= 1
        if not attempt.plan.covers(counts):
            self.stats.retried += not attempt.stands_in
            seldom = self._hits < MIN_HITS_TO_AMORTIZE_RETRY
            self._backoff = min(2 * self._backoff + 1, MAX_BACKOFF_PASSES) if seldom else 0
            self._exact_passes = 0
            return None
        self.plan = attempt.plan
        self._hits += 1
        self.stats.capacity += 1
        self.stats.count(attempt.plan.dispatcher)
        metadata = attempt.dispatched.metadata
        slots_N = metadata.tensors.slots_P
        assert slots_N is not None
        slots_P = slots_N[: sum(counts.pairs.sent)]
        return replace(metadata, pairs=counts.pairs, tensors=MetadataTensors(slots_P))

    def _plan_next_passes(self, inp: RankInput, counts: PassCounts, dispatcher: Dispatcher) -> None:
        if not isinstance(dispatcher, AllGatherDispatcher) or not self.has_capacity:
            return
        if self._exact_passes >= self._backoff:
            self.plan = CapacityPlan.from_counts(inp, counts, dispatcher, self.transport)
            self._failures = self.group_passes.failures
            self._hits = 0
        self._exact_passes += 1


def _compute(
    dispatched: Dispatched, sum_dtype: torch.dtype, experts: Experts
) -> tuple[Tensor, SavedPairs | None]:
    """Output (T, H) of the experts of all ranks, and what to save of this rank's."""
    with phase("experts"):
        combine = dispatched.combine(sum_dtype)
        saved = experts(dispatched.received, combine.outputs)
    with phase("combine"):
        return combine.result(), saved


def _write_zeros(received: ReceivedTokens, outputs: Outputs) -> None:
    """Stand in for the experts: a rank without tokens still sends and adds up partial sums."""
    wait_for_rows(received.inputs)
    for chunk in outputs():
        chunk.out.zero_()
        chunk.on_written()


def _completed(out_TH: Tensor, saved: SavedPairs | None, dispatched: Dispatched) -> CompletedPass:
    return CompletedPass(
        out_TH=out_TH,
        saved=saved,
        received=dispatched.received,
        metadata=dispatched.metadata,
        dispatcher=dispatched.dispatcher,
    )


def _copy_to_host(header_2WF: Tensor) -> _HeadersOnHost:
    """Start the copy on a side stream, so that it does not wait for the experts."""
    device, copied = header_2WF.device, None
    with SideStream(device):
        on_host = header_2WF.to("cpu", non_blocking=True)
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
    return _HeadersOnHost(on_host, copied)


def wait_for_event(event: torch.cuda.Event, timeout: float) -> None:
    """Wait on the host until the device reaches `event`.

    Polls, as blocking in the driver could last twice as long: where another collective failed
    before, the kernel that is waited for here starts its own timeout only then.

    Raises:
        RuntimeError: the event is not reached within `timeout` seconds, or the device failed.
    """
    end = time.monotonic() + timeout
    try:
        while not event.query() and time.monotonic() < end:
            time.sleep(0)
        if event.query():
            return event.synchronize()
    except RuntimeError as error:
        # A barrier that some rank does not reach in time ends like any kernel that fails.
        raise RuntimeError(
            "the device failed while this rank waited for the counts of others: a kernel "
            "failed before, or a rank did not come within the group's timeout"
        ) from error
    raise RuntimeError(
        f"a rank did not come within the group's timeout: no counts of others in {timeout:g} s"
    )

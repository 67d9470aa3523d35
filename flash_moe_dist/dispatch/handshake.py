"""What ranks tell each other at the start of a forward pass, and how they agree on errors.

W ranks, F header fields, T tokens and K experts per token on this rank. Each rank sends a `Header`
to every other: rows and pairs to come, bad ids, tokens, and a checksum of what all ranks must
share: settings, and which pass this is. A rank with wrong input sends INVALID_INPUT instead, so
that all ranks notice in the same exchange and then raise the same error.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.backend_choice import check_backend, default_backend, uses_triton
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.expert_math import NeedsGrad
from flash_moe.ops.indices import poll_index_errors, raise_ids_out_of_range
from flash_moe.ops.input_checks import check_routing
from flash_moe_dist.agreement import raise_differences, raise_same_error
from flash_moe_dist.dispatch.collectives import exchange_headers
from flash_moe_dist.dispatch.header import INVALID_INPUT, TOKENS_DO_NOT_FIT, Header
from flash_moe_dist.dispatch.pass_order import PassIdentity
from flash_moe_dist.dispatch.routing import Routing


@dataclass(frozen=True)
class LayerSettings:
    """What a forward pass takes from its layer; must be the same on all ranks.

    num_experts: E, over all ranks.
    hidden_size: H, of the tables.
    table_dtypes: dtypes of the down and the up table.
    device: device of the tables.
    dispatcher: the option; if it is "auto", the dispatcher follows from what else is shared.
    needs_grad: which gradients are needed.
    """

    num_experts: int
    hidden_size: int
    table_dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device
    dispatcher: str
    needs_grad: NeedsGrad


@dataclass(frozen=True)
class SharedSettings:
    """Settings that all ranks must share, by the names that an error gives them.

    sizes: what the sizes of messages follow from.
    needs_grad: which gradients are needed.
    checksum: CRC-32 of both.
    """

    sizes: dict[str, Any]
    needs_grad: dict[str, Any]
    checksum: int


# Described once for each kind of pass: a dictionary and its checksum cost as much as a launch.
@lru_cache(maxsize=256)
def _shared_settings(
    settings: LayerSettings,
    top_k: int,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    backend: str,
) -> SharedSettings:
    sizes = {
        "num_experts": settings.num_experts,
        "hidden_size": settings.hidden_size,
        "num_experts_per_tok": top_k,
        "dtype of hidden_states": hidden_dtype,
        "dtype of routing_weights": weight_dtype,
        "dtypes of the tables": settings.table_dtypes,
        "dispatcher": settings.dispatcher,
        "backend": backend,
    }
    gradients = "which of hidden states, down table, up table, routing weights need gradients"
    needs_grad = {gradients: list(settings.needs_grad)}
    checksum = zlib.crc32(repr((sizes, needs_grad)).encode())
    return SharedSettings(sizes, needs_grad, checksum)


NO_TENSOR = torch.empty(0, device="cpu")


@dataclass(frozen=True)
class RankInput:
    """One rank's part of a forward pass, or the error that is wrong with it.

    hidden_TH, indices_TK, weights_TK: the tokens and their routing.
    num_experts: E, over all ranks.
    sum_dtype: dtype of partial sums.
    shared: settings that all ranks must share.
    identity: which pass this is; all ranks must make the same.
    in_kernels: whether Triton kernels run on the device.

    With an error, only `device` and `error` are set.
    """

    device: torch.device
    error: Exception | None = None
    hidden_TH: Tensor = NO_TENSOR
    indices_TK: Tensor = NO_TENSOR
    weights_TK: Tensor = NO_TENSOR
    num_experts: int = 0
    sum_dtype: torch.dtype = torch.float32
    shared: SharedSettings | None = None
    identity: PassIdentity | None = None
    in_kernels: bool = False

    @classmethod
    def check(
        cls,
        hidden_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        settings: LayerSettings,
        identity: PassIdentity,
    ) -> "RankInput":
        """Check shapes, dtypes and devices; does not raise, as the other ranks must hear of it."""
        backend = default_backend(settings.device)
        error = _input_error(hidden_TH, indices_TK, weights_TK, settings, backend)
        if error is not None:
            return cls(settings.device, error)
        shared = _shared_settings(
            settings, indices_TK.shape[1], hidden_TH.dtype, weights_TK.dtype, backend
        )
        return cls(
            device=settings.device,
            hidden_TH=hidden_TH,
            indices_TK=indices_TK,
            weights_TK=weights_TK,
            num_experts=settings.num_experts,
            sum_dtype=accumulator_dtype(hidden_TH.dtype, settings.table_dtypes[0]),
            shared=shared,
            identity=identity,
            in_kernels=uses_triton(backend),
        )

    @cached_property
    def checksum(self) -> int:
        """Checksum of all that the ranks must share, in 31 bits, or INVALID_INPUT."""
        if self.shared is None:
            return INVALID_INPUT
        return 1 + zlib.crc32(repr(self.identity).encode(), self.shared.checksum) % (2**31 - 1)

    def routing(self, ep_size: int) -> Routing:
        return Routing.from_indices(self.indices_TK, self.num_experts, ep_size, self.in_kernels)

    def agreed_counts(
        self, sent_WF: list[list[int]], received_WF: list[list[int]], group: dist.ProcessGroup
    ) -> "PassCounts":
        """Counts of a pass, if the headers show that every rank's input is right.

        Raises:
            TypeError, ValueError: on every rank alike, if any rank's input is wrong or the ranks'
                settings differ.
        """
        sent = _Columns.of(sent_WF)
        received = _Columns.of(received_WF)
        if any(received.bad_ids) or len(set(received.checksum)) > 1 or not all(received.checksum):
            self._raise_on_all_ranks(group)
        return PassCounts(
            rows=Splits(sent.rows, received.rows),
            pairs=Splits(sent.pairs, received.pairs),
            tokens=received.tokens,
            max_pairs=max(received.max_pairs),
        )

    def _raise_on_all_ranks(self, group: dist.ProcessGroup) -> NoReturn:
        error = self.error
        if error is None:
            try:
                raise_ids_out_of_range(self.indices_TK, self.num_experts)
            except ValueError as out_of_range:
                error = out_of_range
        raise_same_error(error, group)
        assert self.shared is not None
        assert self.identity is not None
        shared = self.identity.by_name() | self.shared.sizes | self.shared.needs_grad
        raise_differences(shared, group)
        raise AssertionError("headers showed an error that no rank reports")


class Splits(NamedTuple):
    """Rows, or pairs, that this rank sends to and receives from each rank: (W,) on the host."""

    sent: list[int]
    received: list[int]


class _Columns(NamedTuple):
    """Headers (W, F) by field, in the order of `Header`."""

    rows: list[int]
    pairs: list[int]
    bad_ids: list[int]
    tokens: list[int]
    checksum: list[int]
    max_pairs: list[int]

    @classmethod
    def of(cls, header_WF: list[list[int]]) -> "_Columns":
        return cls(*map(list, zip(*header_WF, strict=True)))


@dataclass(frozen=True)
class PassCounts:
    """Rows and pairs that travel in a pass, tokens of each rank (W,).

    max_pairs: the most pairs that any rank sends to any other.
    """

    rows: Splits
    pairs: Splits
    tokens: list[int]
    max_pairs: int

    @property
    def max_tokens(self) -> int:
        return max(self.tokens)

    @property
    def all_fit(self) -> bool:
        """Whether no rank said that its tokens exceed the static capacity."""
        return TOKENS_DO_NOT_FIT not in self.tokens


class ExactCounts(NamedTuple):
    """This rank's pairs by owner, the counts of all ranks, and the headers received (W, F)."""

    routing: Routing
    counts: PassCounts
    header_WF: Tensor


def exchange_counts(
    inp: RankInput, ep_size: int, group: dist.ProcessGroup, count_rows: bool
) -> ExactCounts:
    """Exchange headers and wait for them on the host: the one host sync of a forward pass.

    Raises:
        TypeError, ValueError: on every rank alike, if any rank's input is wrong or the ranks'
            settings differ.
    """
    header_2WF = torch.zeros(2, ep_size, len(Header), dtype=torch.int64, device=inp.device)
    sent_WF, received_WF = header_2WF
    routing = None
    # A header of zeros has the checksum INVALID_INPUT.
    if inp.error is None:
        routing = inp.routing(ep_size)
        routing.write_header(sent_WF, inp.checksum, count_rows)
    exchange_headers(received_WF, sent_WF, group)
    sent, received = header_2WF.tolist()
    counts = inp.agreed_counts(sent, received, group)
    assert routing is not None
    return ExactCounts(routing, counts, received_WF)


def _input_error(
    hidden_TH: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    settings: LayerSettings,
    backend: str,
) -> Exception | None:
    device, hidden_size = settings.device, settings.hidden_size
    try:
        check_backend(backend, device)
        # Reported here, where all ranks hear of it, and not in the middle of an exchange.
        poll_index_errors(device)
        check_routing(hidden_TH, indices_TK, weights_TK)
        if hidden_TH.shape[1] != hidden_size:
            raise ValueError(
                f"hidden_states must have rows of hidden_size = {hidden_size} as the tables "
                f"have, got shape {tuple(hidden_TH.shape)}"
            )
        named = {"hidden_states": hidden_TH, "indices": indices_TK, "routing_weights": weights_TK}
        for name, tensor in named.items():
            if tensor.device != device:
                raise ValueError(
                    f"{name} must be on {device}, where the tables are, got {tensor.device}"
                )
    except (TypeError, ValueError) as error:
        return error
    return None

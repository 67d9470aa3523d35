"""The exchange of counts that begins a dispatch, and what all ranks must agree on in it.

W ranks, T tokens and K experts per token on this rank. What a rank tells another: rows and pairs
it will send there, bad ids it found, tokens it has, and a checksum of its settings.
"""

import zlib
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.backend_choice import check_backend, default_backend
from flash_moe.ops.indices import poll_index_errors, raise_ids_out_of_range
from flash_moe.ops.input_checks import check_routing
from flash_moe_dist.agreement import raise_differences, raise_same_error
from flash_moe_dist.dispatch.comm_volume import COUNTS
from flash_moe_dist.dispatch.message import Routing
from flash_moe_dist.phases import communication


@dataclass(frozen=True)
class Settings:
    """What a forward pass takes from its module, the same on all ranks.

    num_experts: E, over all ranks; hidden_size, table_dtypes, device: of the tables; dispatcher:
    its name; needed: which of hidden states, tables and routing weights need gradients.
    """

    num_experts: int
    hidden_size: int
    table_dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device
    dispatcher: str
    needed: list[bool]


@dataclass(frozen=True)
class Input:
    """A rank's part of a forward pass, checked.

    error: what is wrong with it; sizes, needed: what all ranks must agree on, empty if it is wrong,
    `sizes` being what the sizes of messages follow from.
    """

    hidden_TH: Tensor
    indices_TK: Tensor
    weights_TK: Tensor
    settings: Settings
    error: Exception | None
    sizes: dict[str, Any]
    needed: dict[str, Any]

    @classmethod
    def of(
        cls, hidden_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor, settings: Settings
    ) -> "Input":
        error = _input_error(hidden_TH, indices_TK, weights_TK, settings)
        sizes: dict[str, Any] = {}
        needed: dict[str, Any] = {}
        if error is None:
            sizes = {
                "num_experts": settings.num_experts,
                "hidden_size": settings.hidden_size,
                "num_experts_per_tok": indices_TK.shape[1],
                "dtype of hidden_states": hidden_TH.dtype,
                "dtype of routing_weights": weights_TK.dtype,
                "dtypes of the tables": settings.table_dtypes,
                "dispatcher": settings.dispatcher,
                "backend": default_backend(settings.device),
            }
            gradients = "which of hidden states, tables, routing weights need gradients"
            needed = {gradients: settings.needed}
        return cls(hidden_TH, indices_TK, weights_TK, settings, error, sizes, needed)

    def routing(self, ep_size: int) -> Routing:
        return Routing.of(self.indices_TK, self.settings.num_experts, ep_size)

    @property
    def checksum(self) -> int:
        """Of what must be agreed on, in 31 bits; not 0, which stands for a rank with bad input."""
        return 1 + zlib.crc32(repr((self.sizes, self.needed)).encode()) % (2**31 - 1)

    def counts(
        self, sent: list[list[int]], received: list[list[int]], group: dist.ProcessGroup
    ) -> "Counts":
        """What was exchanged, (W, COUNTS) on the host.

        Raises:
            TypeError, ValueError: on every rank alike, if any rank's input is wrong or they
                disagree.
        """
        rows, pairs, *_ = zip(*sent, strict=True)
        rows_in, pairs_in, bad_ids, tokens, checksums, most = zip(*received, strict=True)
        if any(bad_ids) or len(set(checksums)) > 1 or not all(checksums):
            self._raise_together(group)
            raise AssertionError("bad counts without an error on any rank")
        return Counts(list(rows), list(rows_in), list(pairs), list(pairs_in), tokens, max(most))

    def _raise_together(self, group: dist.ProcessGroup) -> None:
        error = self.error
        if error is None:
            try:
                raise_ids_out_of_range(self.indices_TK, self.settings.num_experts)
            except ValueError as out_of_range:
                error = out_of_range
        raise_same_error(error, group)
        raise_differences({**self.sizes, **self.needed}, group)


@dataclass(frozen=True)
class Counts:
    """Rows and pairs sent to and received from each rank, tokens of each rank.

    most_pairs: that any rank sends to any other.
    """

    rows_sent: list[int]
    rows_received: list[int]
    pairs_sent: list[int]
    pairs_received: list[int]
    tokens: tuple[int, ...]
    most_pairs: int


def exchange_counts(
    given: Input, ep_size: int, group: dist.ProcessGroup, count_rows: bool
) -> tuple[Routing, Counts, Tensor]:
    """Exchange counts, and be sure that all ranks found their input sound.

    One exchange, which the host waits for. With it travel the number of bad ids and a checksum
    of the settings, so that a rank with bad input is known to all.

    Returns:
        Also the counts received, (W, COUNTS) on the device.

    Raises:
        TypeError, ValueError: on every rank alike.
    """
    exchanged_2WC = _zero_counts(given.settings.device, ep_size)
    routing = None
    if given.error is None:
        routing = given.routing(ep_size)
        routing.write_counts(exchanged_2WC[0], given.checksum, count_rows)
    _exchange(exchanged_2WC, group)
    sent, received = exchanged_2WC.tolist()
    counts = given.counts(sent, received, group)
    assert routing is not None
    return routing, counts, exchanged_2WC[1]


def raise_on_all_ranks(
    error: Exception, device: torch.device, group: dist.ProcessGroup
) -> NoReturn:
    """In place of `exchange_counts` on a rank without input: raises `error` on every rank."""
    _exchange(_zero_counts(device, dist.get_world_size(group)), group)
    raise_same_error(error, group)
    raise AssertionError("an error of this rank was not raised")


def _zero_counts(device: torch.device, ep_size: int) -> Tensor:
    """Counts sent and received: those of a rank with bad input."""
    return torch.zeros(2, ep_size, COUNTS, dtype=torch.int64, device=device)


def _exchange(exchanged_2WC: Tensor, group: dist.ProcessGroup) -> None:
    sent_WC, received_WC = exchanged_2WC
    with communication():
        dist.all_to_all_single(received_WC, sent_WC, group=group)


def _input_error(
    hidden_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor, settings: Settings
) -> Exception | None:
    device, hidden_size = settings.device, settings.hidden_size
    try:
        check_backend(default_backend(device), device)
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

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

from flash_moe.ops.arrange import poll_index_errors, raise_ids_out_of_range
from flash_moe.ops.backends import check_backend, default_backend
from flash_moe.ops.checks import check_routing
from flash_moe_dist.agreement import raise_differences, raise_same_error
from flash_moe_dist.routing import Routing
from flash_moe_dist.steps import communication
from flash_moe_dist.volume import COUNTS


@dataclass(frozen=True)
class Settings:
    """What a forward pass takes from its module, the same on all ranks.

    num_experts: E, over all ranks; hidden_size, device: of the tables; others: whatever else the
    ranks must agree on, by name.
    """

    num_experts: int
    hidden_size: int
    device: torch.device
    others: dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """Rows and pairs sent to and received from each rank, and the most tokens of any rank.

    received_WC: what each rank sent in the exchange, on the device.
    """

    rows_sent: list[int]
    rows_received: list[int]
    pairs_sent: list[int]
    pairs_received: list[int]
    most_tokens: int
    received_WC: Tensor


def agree_on_counts(
    hidden_TH: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    settings: Settings,
    ep_size: int,
    group: dist.ProcessGroup,
) -> tuple[Routing, Counts]:
    """Check this rank's input, exchange counts, and be sure that all ranks found theirs sound.

    One exchange, which the host waits for. With it travel the number of bad ids and a checksum
    of the settings, so that a rank with bad input is known to all.

    Raises:
        TypeError, ValueError: on every rank alike.
    """
    error = _input_error(hidden_TH, indices_TK, weights_TK, settings)
    routing: Routing | None = None
    agreed: dict[str, Any] = {}
    exchanged_2WC = _nothing(settings.device, ep_size)
    if error is None:
        routing = Routing.of(indices_TK, settings.num_experts, ep_size)
        agreed = {
            "num_experts": settings.num_experts,
            "hidden_size": settings.hidden_size,
            "num_experts_per_tok": indices_TK.shape[1],
            "dtype of hidden_states": hidden_TH.dtype,
            "dtype of routing_weights": weights_TK.dtype,
            **settings.others,
        }
        # A rank with bad input has agreed to nothing, and sends 0.
        routing.write_counts(exchanged_2WC[0], 1 + zlib.crc32(repr(agreed).encode()))
    _exchange(exchanged_2WC, group)
    sent, received = (list(zip(*counts, strict=True)) for counts in exchanged_2WC.tolist())
    sound = not any(received[2]) and len(set(received[4])) == 1
    if routing is None or not sound:
        _raise_together(error, indices_TK, agreed, settings, group)
        raise AssertionError("bad counts without an error on any rank")
    return routing, Counts(
        rows_sent=list(sent[0]),
        rows_received=list(received[0]),
        pairs_sent=list(sent[1]),
        pairs_received=list(received[1]),
        most_tokens=max(received[3]),
        received_WC=exchanged_2WC[1],
    )


def fail_together(error: Exception, device: torch.device, group: dist.ProcessGroup) -> NoReturn:
    """In place of `agree_on_counts` on a rank without input: raises `error` on every rank."""
    _exchange(_nothing(device, dist.get_world_size(group)), group)
    raise_same_error(error, group)
    raise AssertionError("an error of this rank was not raised")


def _nothing(device: torch.device, ep_size: int) -> Tensor:
    """Counts sent and received, both 0."""
    return torch.zeros(2, ep_size, COUNTS, dtype=torch.int64, device=device)


def _exchange(exchanged_2WC: Tensor, group: dist.ProcessGroup) -> None:
    sent_WC, received_WC = exchanged_2WC
    with communication():
        dist.all_to_all_single(received_WC, sent_WC, group=group)


def _raise_together(
    error: Exception | None,
    indices_TK: Tensor,
    agreed: dict[str, Any],
    settings: Settings,
    group: dist.ProcessGroup,
) -> None:
    if error is None:
        try:
            raise_ids_out_of_range(indices_TK, settings.num_experts)
        except ValueError as out_of_range:
            error = out_of_range
    raise_same_error(error, group)
    raise_differences(agreed, group)


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

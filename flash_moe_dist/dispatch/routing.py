"""This rank's (token, expert) pairs, sorted and counted by the rank that owns their expert.

T local tokens, K experts per token, N = T K; W ranks, each the owner of a contiguous range of
experts. Pairs are ordered rank by rank, within a rank token by token, within a token by ascending
expert id. An index of -1 belongs to no rank.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from flash_moe.ops.backend_choice import MAX_SORTED_SLOTS
from flash_moe.ops.indices import order_dtype
from flash_moe.ops.triton_launch import launch, next_power_of_2
from flash_moe_dist.dispatch.header import Header
from flash_moe_dist.dispatch.partition import experts_per_rank
from flash_moe_dist.dispatch.routing_kernels import route_kernel, write_header_kernel


@dataclass(frozen=True)
class Routing:
    """This rank's pairs by owner, on the device.

    ids_N          ids sorted within each token, -1 for an id that is not an expert
    slots_N        position in (T, K) that each sorted id came from
    begin_WT       where the pairs of token t with rank w begin in ids_N
    pairs_WT       how many there are
    out_of_range   (1,) number of ids that are neither an expert nor -1; they are sent nowhere
    local_size     experts of each rank but the last ones
    in_kernels     whether Triton kernels do the work, else torch operations
    """

    ids_N: Tensor
    slots_N: Tensor
    begin_WT: Tensor
    pairs_WT: Tensor
    out_of_range: Tensor
    local_size: int
    in_kernels: bool

    @classmethod
    def from_indices(
        cls, indices_TK: Tensor, num_experts: int, ep_size: int, in_kernels: bool
    ) -> "Routing":
        """Sort the ids of each token and find each rank's run among them.

        Args:
            indices_TK: (T, K) int32 or int64, any values.
            num_experts: E, over all ranks.
            ep_size: W.
            in_kernels: use Triton kernels.
        """
        local_size = experts_per_rank(num_experts, ep_size)
        if in_kernels and 0 < indices_TK.shape[1] <= MAX_SORTED_SLOTS:
            return cls._from_kernel(indices_TK, num_experts, ep_size, local_size)
        device = indices_TK.device
        num_tokens, top_k = indices_TK.shape
        ids_TK, slot_TK = indices_TK.sort(dim=1, stable=True)
        # The last rank's range ends with the last expert, so ids beyond it belong to no rank.
        bounds = (torch.arange(ep_size + 1, device=device) * local_size).clamp(max=num_experts)
        bounds_TW1 = bounds.to(ids_TK.dtype).repeat(num_tokens, 1)
        begin_TW1 = torch.searchsorted(ids_TK, bounds_TW1)
        first_slot_T = torch.arange(num_tokens, device=device) * top_k
        return cls(
            ids_N=ids_TK.flatten().to(torch.int32),
            slots_N=(slot_TK + first_slot_T.unsqueeze(1)).flatten(),
            begin_WT=begin_TW1[:, :-1].t() + first_slot_T,
            pairs_WT=begin_TW1.diff(dim=1).t().contiguous(),
            out_of_range=((indices_TK < -1) | (indices_TK >= num_experts)).sum().view(1),
            local_size=local_size,
            in_kernels=in_kernels,
        )

    @classmethod
    def _from_kernel(
        cls, indices_TK: Tensor, num_experts: int, ep_size: int, local_size: int
    ) -> "Routing":
        device, (num_tokens, top_k) = indices_TK.device, indices_TK.shape
        num_slots = num_tokens * top_k
        block = next_power_of_2(top_k)
        keys_fit_32_bits = (num_experts + 2) * block < 2**31
        routing = cls(
            ids_N=torch.empty(num_slots, device=device, dtype=torch.int32),
            slots_N=torch.empty(num_slots, device=device, dtype=order_dtype(num_slots)),
            begin_WT=torch.empty(ep_size, num_tokens, device=device, dtype=torch.int64),
            pairs_WT=torch.empty(ep_size, num_tokens, device=device, dtype=torch.int64),
            out_of_range=torch.zeros(1, device=device, dtype=torch.int64),
            local_size=local_size,
            in_kernels=True,
        )
        if num_tokens:
            launch(
                route_kernel,
                (num_tokens,),
                indices_TK.contiguous(),
                routing.ids_N,
                routing.slots_N,
                routing.begin_WT,
                routing.pairs_WT,
                routing.out_of_range,
                num_experts,
                local_size,
                ep_size,
                TOP_K=top_k,
                BLOCK=block,
                KEY=triton.language.int32 if keys_fit_32_bits else triton.language.int64,
                # As long as one warp can hold the keys, none of them crosses to another.
                num_warps=1 if block <= 1024 else block // 128,
            )
        return routing

    @cached_property
    def pairs_end(self) -> Tensor:
        """(W*T,) int64: number of pairs up to each token's with each rank, inclusive."""
        return self.pairs_WT.flatten().cumsum(0)

    @cached_property
    def rows_end(self) -> Tensor:
        """(W*T,) int64: number of rows up to each token's for each rank, inclusive."""
        return (self.pairs_WT.flatten() > 0).cumsum(0)

    def write_header(
        self,
        header_WF: Tensor,
        checksum: int,
        count_rows: bool = True,
        copy_WF: Tensor | None = None,
    ) -> None:
        """Fill in the header to each rank.

        Args:
            header_WF: (W, F) int64, written.
            checksum: `RankInput.checksum`.
            count_rows: count the rows that have pairs; otherwise ROWS is 0.
            copy_WF: receives the same, with rows in any stride.
        """
        copy_WF = header_WF if copy_WF is None else copy_WF
        ep_size, num_tokens = self.pairs_WT.shape
        if num_tokens and self.in_kernels:
            launch(
                write_header_kernel,
                (ep_size,),
                self.pairs_end,
                self.rows_end if count_rows else self.pairs_end,
                self.out_of_range,
                header_WF,
                copy_WF,
                copy_WF.stride(0),
                num_tokens,
                checksum,
                ep_size,
                COUNT_ROWS=count_rows,
                num_warps=1,
            )
            return
        pairs_W = self.pairs_WT.sum(1)
        header_WF[:, Header.ROWS] = (self.pairs_WT > 0).sum(1) if count_rows else 0
        header_WF[:, Header.PAIRS] = pairs_W
        header_WF[:, Header.BAD_IDS] = self.out_of_range
        header_WF[:, Header.TOKENS] = num_tokens
        header_WF[:, Header.CHECKSUM] = checksum
        header_WF[:, Header.MAX_PAIRS] = pairs_W.max()
        if copy_WF is not header_WF:
            copy_WF.copy_(header_WF)

    def pairs_in_order(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Pairs in the order in which they are sent.

        Args:
            num_pairs: P, the number of pairs; passed in, as counting them would wait for the
                device.

        Returns:
            Ids local to their owner (P,) int32, and positions in (T, K), (P,).
        """
        ep_size, num_tokens = self.pairs_WT.shape
        counts = self.pairs_WT.flatten()
        shift = self.begin_WT.flatten() - (self.pairs_end - counts)
        first_expert_W = torch.arange(ep_size, device=counts.device) * self.local_size
        shift_and_expert = torch.stack(
            [shift, first_expert_W.repeat_interleave(num_tokens)], dim=1
        ).repeat_interleave(counts, dim=0, output_size=num_pairs)
        positions = torch.arange(num_pairs, device=counts.device) + shift_and_expert[:, 0]
        local_ids_P = (self.ids_N[positions] - shift_and_expert[:, 1]).to(torch.int32)
        return local_ids_P, self.slots_N[positions]

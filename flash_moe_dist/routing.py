"""Which pairs and rows go to which rank.

T local tokens, K experts per token, N = T K; W ranks, each the owner of a run of experts; S rows
and P pairs sent by this rank.

Pairs are sent rank by rank, within a rank token by token, within a token by ascending expert id.
An index of -1 is sent nowhere.

Example: 2 ranks of 2 experts, this rank's tokens choose [3, 0], [1, 0], [2, -1]. Rank 0 gets the
pairs of token 0 with its local expert [0] and of token 1 with [0, 1]; rank 1 those of token 0 with
its local expert [1] and of token 2 with [0]. Rows, if sent once to each rank that needs them: of
tokens 0 and 1 to rank 0, of tokens 0 and 2 to rank 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe_dist.sharding import experts_per_rank


@dataclass(frozen=True)
class Routing:
    """This rank's pairs by owner, on the device.

    ids_N, slots_N   ids sorted within each token, and the place in (T, K) each came from
    begin_WT         where the pairs of token t with rank w begin in ids_N
    pairs_WT         how many there are
    out_of_range     () how many ids are neither an expert nor -1; these go nowhere
    local_size       experts of each rank but the last ones
    """

    ids_N: Tensor
    slots_N: Tensor
    begin_WT: Tensor
    pairs_WT: Tensor
    out_of_range: Tensor
    local_size: int

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int, ep_size: int) -> "Routing":
        device = indices_TK.device
        num_tokens, slots = indices_TK.shape
        ids_TK, slot_TK = indices_TK.sort(dim=1)
        local_size = experts_per_rank(num_experts, ep_size)
        # The last rank's range ends with the last expert: ids beyond it go nowhere.
        bounds = (torch.arange(ep_size + 1, device=device) * local_size).clamp(max=num_experts)
        bounds_TW1 = bounds.to(ids_TK.dtype).repeat(num_tokens, 1)
        begin_TW1 = torch.searchsorted(ids_TK, bounds_TW1)
        first_slot_T = torch.arange(num_tokens, device=device) * slots
        return cls(
            ids_TK.flatten(),
            (slot_TK + first_slot_T.unsqueeze(1)).flatten(),
            begin_TW1[:, :-1].t() + first_slot_T,
            begin_TW1.diff(dim=1).t().contiguous(),
            ((indices_TK < -1) | (indices_TK >= num_experts)).sum(),
            local_size,
        )

    def counts_2W(self) -> Tensor:
        """Rows for each rank, and pairs for each rank."""
        return torch.stack([(self.pairs_WT > 0).sum(1), self.pairs_WT.sum(1)])

    def pairs(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        """The pairs in the order they are sent; `num_pairs` = P spares a wait for the device.

        Returns:
            local ids (P,) int32 for their owner, and the places (P,) in (T, K) they came from.
        """
        ep_size, num_tokens = self.pairs_WT.shape
        counts = self.pairs_WT.flatten()
        shift = self.begin_WT.flatten() - (counts.cumsum(0) - counts)
        first_expert_W = torch.arange(ep_size, device=counts.device) * self.local_size
        shift_and_expert = torch.stack(
            [shift, first_expert_W.repeat_interleave(num_tokens)], dim=1
        ).repeat_interleave(counts, dim=0, output_size=num_pairs)
        places = torch.arange(num_pairs, device=counts.device) + shift_and_expert[:, 0]
        local_ids = (self.ids_N[places] - shift_and_expert[:, 1]).to(torch.int32)
        return local_ids, self.slots_N[places]

    def rows(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows in the order they are sent, each once to each rank that needs it.

        `num_rows` = S spares a wait for the device.

        Returns:
            tokens (S,) of the rows, pairs (S,) int32 of each, and sent_TW (T, W) int32: which
            of the S rows are copies of token t, in the order of the ranks, -1 for none.
        """
        ep_size, num_tokens = self.pairs_WT.shape
        counts = self.pairs_WT.flatten()
        is_sent = counts > 0
        places_S = torch.nonzero_static(is_sent, size=num_rows).squeeze(1)
        sent_WT = (is_sent.cumsum(0) - 1).masked_fill(~is_sent, -1).view(ep_size, num_tokens)
        return (
            places_S % max(1, num_tokens),
            counts[places_S].to(torch.int32),
            sent_WT.t().to(torch.int32).contiguous(),
        )

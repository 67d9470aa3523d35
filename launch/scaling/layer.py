"""The sharded layer that is measured, with this rank's tokens.

T local tokens, H hidden size, E experts, e of them on this rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe import FlashExperts
from flash_moe.bench.cases import Inputs
from flash_moe_dist import ExpertParallel
from flash_moe_dist.dispatch.partition import experts_per_rank
from flash_moe_dist.expert_parallel import ExpertParallelFunc
from scaling.conventional import conventional_expert_func
from scaling.problems import Tokens
from scaling.rank_group import RankGroup
from scaling.results import SINGLE_RANK
from scaling.traffic import Traffic, sent_by_one_rank

TABLES = ("down_weights", "up_weights")


class Layer:
    """`FlashExperts` sharded over ranks, with this rank's shard of the inputs."""

    def __init__(self, inputs: Inputs, ranks: RankGroup) -> None:
        _, *full_EH, _ = inputs.leaves
        num_experts, hidden_size = full_EH[0].shape
        self.ranks, self.num_experts = ranks, num_experts
        # Reused, because each learns its static capacity from its earlier passes.
        self.funcs: dict[Any, ExpertParallelFunc] = {}
        self.experts = FlashExperts(num_experts, hidden_size, "meta", full_EH[0].dtype)
        parallelize_module(self.experts, ranks.mesh, ExpertParallel())
        self.experts.to_empty(device=ranks.device)
        own = owned_rows(num_experts, ranks.size, ranks.rank)
        for table, full in zip(self.tables, full_EH, strict=True):
            table.to_local().copy_(full.detach()[own])
        self.tokens = Tokens.of_rank(inputs, ranks.rank, ranks.size)

    @property
    def tables(self) -> tuple[DTensor, DTensor]:
        """The down and the up table (E, H), sharded over dim 0."""
        tables: Any = [self.experts.get_parameter(name).detach() for name in TABLES]
        return tables[0], tables[1]

    def choose(self, dispatcher: Any) -> None:
        """Use this dispatcher in later passes: a dispatcher or "auto"; not used on one rank."""
        if dispatcher not in self.funcs:
            option: Any = "auto" if dispatcher == SINGLE_RANK else dispatcher
            self.funcs[dispatcher] = ExpertParallelFunc(self.ranks.mesh, option)
        self.experts.expert_func = self.funcs[dispatcher]

    def forward(self) -> None:
        """Run the forward pass and keep its output."""
        tokens = self.tokens
        self.out_TH = self.experts(tokens.hidden_TH, tokens.indices_TK, tokens.weights_TK)

    def backward(self) -> None:
        """Run the backward pass of the last forward pass."""
        self.out_TH.backward(self.tokens.grad_TH)

    def clear(self) -> None:
        """Drop the output and all gradients."""
        self.out_TH = torch.empty(0)
        for leaf in (self.tokens.hidden_TH, self.tokens.weights_TK, *self.experts.parameters()):
            leaf.grad = None

    def conventional(self) -> Tensor:
        """Output (T, H) of the conventional dispatch."""
        tokens = self.tokens
        down_eH, up_eH = (table.to_local() for table in self.tables)
        return conventional_expert_func(
            tokens.hidden_TH,
            down_eH,
            up_eH,
            tokens.indices_TK,
            tokens.weights_TK,
            self.num_experts,
            self.ranks.group,
        )

    def traffic(self) -> Traffic:
        """Rows and pairs that the ranks send each other. Collective; waits for the device."""
        sent = sent_by_one_rank(self.tokens.indices_TK, self.num_experts, self.ranks.size)
        rows, pairs = zip(*self.ranks.gather(sent), strict=True)
        return Traffic(torch.stack(rows), torch.stack(pairs), len(self.tokens.indices_TK))

    def results(self) -> tuple[Tensor, ...]:
        """Run both passes; return the output and the gradients in the order of LEAVES.

        Gradients of tables are (e, H), for the rows of this rank.
        """
        self.clear()
        self.forward()
        self.backward()
        tables: Any = [self.experts.get_parameter(name).grad for name in TABLES]
        hidden_grad, weights_grad = self.tokens.hidden_TH.grad, self.tokens.weights_TK.grad
        assert hidden_grad is not None
        assert weights_grad is not None
        grads_eH = [table.to_local() for table in tables]
        return self.out_TH.detach(), hidden_grad, *grads_eH, weights_grad


def owned_rows(num_experts: int, ranks: int, rank: int) -> slice:
    """Rows of the tables that `rank` owns."""
    size = experts_per_rank(num_experts, ranks)
    return slice(min(num_experts, rank * size), min(num_experts, (rank + 1) * size))

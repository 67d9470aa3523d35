"""Problems whose scaling is measured, and one rank's shard of their inputs."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flash_moe.bench.cases import DTYPES, Case, Inputs
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe_dist.dispatch.comm_volume import DispatcherName, ElementSizes, cheaper_dispatcher

Scaling = Literal["weak", "strong"]


@dataclass(frozen=True)
class Problem:
    """A layer, its routing, and how the number of its tokens depends on the number of ranks.

    scaling: "weak": each rank has `tokens` tokens; "strong": all ranks together have.
    Other fields: as in `flash_moe.bench.cases.Case`, which checks them.
    """

    scaling: Scaling
    tokens: int
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    dtype: str
    routing: str
    key_bias: float

    @property
    def name(self) -> str:
        """Title for tables and plots."""
        of = "per rank" if self.scaling == "weak" else "in all"
        bias = f", key bias {self.key_bias:g}" if self.routing == "product_keys" else ""
        return (
            f"{self.scaling} scaling, {self.tokens} tokens {of}, K={self.num_experts_per_tok}, "
            f"H={self.hidden_size}, E={self.num_experts}, {self.dtype}, {self.routing}{bias}"
        )

    def tokens_per_rank(self, ranks: int) -> int:
        """Tokens of each of `ranks` ranks."""
        return self.tokens if self.scaling == "weak" else self.tokens // ranks

    def element_sizes(self, ranks: int) -> ElementSizes:
        """Sizes that `flash_moe_dist.dispatch.comm_volume` computes bytes from."""
        dtype = DTYPES[self.dtype]
        sum_dtype = accumulator_dtype(dtype, dtype)
        sizes = (dtype.itemsize, sum_dtype.itemsize, dtype.itemsize)
        return ElementSizes(ranks, self.hidden_size, *sizes)

    def auto(self, ranks: int) -> DispatcherName:
        """The dispatcher that "auto" chooses on this many ranks."""
        return cheaper_dispatcher(self.element_sizes(ranks), self.num_experts_per_tok)

    def case(self, ranks: int) -> Case:
        """The tokens of all ranks as one case for one device.

        Raises:
            ValueError: `ranks` does not divide the tokens in strong scaling; see also `Case`.
        """
        if self.scaling == "strong" and self.tokens % ranks:
            raise ValueError(
                f"--total-tokens must be a multiple of every number of ranks, got {self.tokens} "
                f"tokens and {ranks} ranks"
            )
        return Case(
            self.name,
            self.tokens_per_rank(ranks) * ranks,
            self.hidden_size,
            self.num_experts,
            self.num_experts_per_tok,
            self.dtype,
            self.routing,
            self.key_bias,
        )


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens.

    Hidden states (T, H), expert ids and routing weights (T, K), gradient of the output (T, H).
    """

    hidden_TH: Tensor
    indices_TK: Tensor
    weights_TK: Tensor
    grad_TH: Tensor

    @classmethod
    def of_rank(cls, inputs: Inputs, rank: int, ranks: int) -> "Tokens":
        """Copy the `rank`-th of `ranks` equal shards."""
        hidden_NH, _, _, weights_NK = inputs.leaves
        hidden_TH, indices_TK, weights_TK, grad_TH = (
            rows.detach().chunk(ranks)[rank].clone()
            for rows in (hidden_NH, inputs.indices, weights_NK, inputs.grad)
        )
        return cls(hidden_TH.requires_grad_(), indices_TK, weights_TK.requires_grad_(), grad_TH)

    def leaves(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that get a gradient, in the order of `flash_moe.bench.cases.LEAVES`."""
        return self.hidden_TH, *tables, self.weights_TK

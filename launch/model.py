"""A small decoder-only transformer with FlashMoE feed-forward layers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flash_moe import FlashMoE
from flash_moe.layers.moe import SharedMLP
from flash_moe.layers.router import BIAS_UPDATE_RATE, ScoreNormName

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, and options of its routers.

    num_experts: experts of each layer; with 0, feed-forward layers are a shared MLP alone.
    score_norm and the following: see `flash_moe.layers.router.ProductKeyRouter`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_experts: int
    num_experts_per_tok: int
    score_norm: ScoreNormName = "batch"
    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    bias_update_rate: float = BIAS_UPDATE_RATE
    force_load_balance: bool = False

    def __post_init__(self) -> None:
        head_size, rest = divmod(self.hidden_size, self.num_heads)
        if rest or head_size % 2:
            raise ValueError(
                f"hidden_size must be an even multiple of num_heads = {self.num_heads} "
                f"(rotary attention rotates pairs of features), got {self.hidden_size}"
            )


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021, arXiv:2104.09864)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        batch, seq_len, hidden_size = x_BSH.shape
        qkv = self.qkv_proj(x_BSH).view(batch, seq_len, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, seq_len, hidden_size))


class Block(nn.Module):
    """Pre-norm residual block: causal self-attention, then a FlashMoE layer or a gated MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden_size)
        sizes = config.hidden_size, config.intermediate_size
        self.moe = (
            FlashMoE(
                *sizes,
                config.num_experts,
                config.num_experts_per_tok,
                score_norm=config.score_norm,
                aux_loss_coef=config.aux_loss_coef,
                z_loss_coef=config.z_loss_coef,
                bias_update_rate=config.bias_update_rate,
                force_load_balance=config.force_load_balance,
            )
            if config.num_experts
            else SharedMLP(*sizes)
        )

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        return x_BSH + self.moe(self.moe_norm(x_BSH))


class Transformer(nn.Module):
    """Language model from token ids (B, S) int64 to logits (B, S, vocab_size)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Re-initialise embedding and head (std 0.02); other layers keep their defaults."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSH = self.embedding(tokens_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        return self.head(self.final_norm(x_BSH))

    @torch.no_grad()
    def generate(self, prompt_S: Tensor, num_tokens: int, context: int, seed: int) -> Tensor:
        """Continue a prompt by sampling one token at a time from the model's distribution.

        Under expert parallelism all ranks must call it with the same arguments, and get the same
        tokens.

        Args:
            prompt_S: (S,) int64.
            context: the model sees at most this many of the last tokens.
            seed: seed of the sampling.

        Returns:
            (S + num_tokens,) int64, the prompt first.
        """
        draw = torch.Generator().manual_seed(seed)
        tokens_S = prompt_S
        for _ in range(num_tokens):
            logits_V = self(tokens_S[-context:].unsqueeze(0))[0, -1]
            probabilities = logits_V.double().softmax(0).cpu()
            following = torch.multinomial(probabilities, 1, generator=draw)
            tokens_S = torch.cat([tokens_S, following.to(tokens_S.device)])
        return tokens_S


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within the block, and back in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Context in which activations are in `precision`, "float32" or "bfloat16"."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def cross_entropy(
    model: nn.Module, inputs_BS: Tensor, targets_BS: Tensor, device: torch.device, precision: str
) -> Tensor:
    """Mean cross-entropy of the model's predictions, () float32, in nats per token."""
    with autocast(device, precision):
        logits_BSV = model(inputs_BS.to(device))
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.to(device).flatten())


def rotate(x_BNSD: Tensor) -> Tensor:
    """Rotate feature pairs (i, i + D/2) of each head by position / ROTARY_BASE^(2i/D).

    x_BNSD: batch, heads, positions, features. Su et al. 2021, arXiv:2104.09864.
    """
    seq_len, head_size = x_BNSD.shape[-2:]
    positions = torch.arange(seq_len, device=x_BNSD.device, dtype=torch.float32)
    pairs = torch.arange(0, head_size, 2, device=x_BNSD.device, dtype=torch.float32)
    angles_SD2 = torch.outer(positions, ROTARY_BASE ** (-pairs / head_size))
    cos, sin = angles_SD2.cos().to(x_BNSD.dtype), angles_SD2.sin().to(x_BNSD.dtype)
    first, second = x_BNSD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

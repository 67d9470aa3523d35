"""Variants of a transformer that are compared: which settings each changes."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch

from flash_moe.layers.router import ScoreNormName
from model import ModelConfig, Transformer
from optimizer import DEFAULT_TABLE_OPTIMIZER, TableOptimizerName
from options import MAX_OPTION, SCORE_NORMS, default_lr, default_table_lr_scale

ROUTER_OFF: dict[str, Any] = {
    "score_norm": None,
    "aux_loss_coef": 0.0,
    "z_loss_coef": 0.0,
    "bias_update_rate": 0.0,
    "force_load_balance": False,
}
# Settings that differ from the options; `dense` also has a wider MLP, see `dense_width`.
BUILT_IN: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": 0},
    "plain": ROUTER_OFF,
    "default": {},
    "batch-norm": {**ROUTER_OFF, "score_norm": "batch"},
}
OPTIMIZERS: dict[str, TableOptimizerName] = {name: name for name in get_args(TableOptimizerName)}
SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True)
class Case:
    """A variant with a seed and a number of experts, to be trained once."""

    variant: str
    seed: int
    config: ModelConfig
    lr: float
    table_lr_scale: float
    table_optimizer: TableOptimizerName

    @property
    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("lr", "table_lr_scale", "table_optimizer")}
        return {**asdict(self.config), **own}

    def __str__(self) -> str:
        experts = f", {self.config.num_experts:,} experts" if self.config.num_experts else ""
        return f"{self.variant}{experts}, seed {self.seed}"


def dense_width(intermediate_size: int, num_experts_per_tok: int) -> int:
    """Width of a gated MLP with as many active parameters as an MLP of that width and K experts.

    An expert is two rows, and a unit of a gated MLP three, so K experts are 2 K / 3 units, rounded.
    The router's keys are not counted: the dense model does without them.
    """
    return intermediate_size + round(2 * num_experts_per_tok / 3)


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """Parse NAME:key=value,key=value into a name and settings.

    Raises:
        ValueError: names --variant, and what is wrong in `text`.
    """
    name, colon, rest = text.partition(":")
    if not name or not colon:
        raise ValueError(f"--variant must be NAME:key=value,key=value, got {text!r}")
    if name in BUILT_IN:
        raise ValueError(
            f"--variant must have another name than {', '.join(BUILT_IN)}, got {text!r}"
        )
    parsers, settings = _parsers(), {}
    for setting in rest.split(",") if rest else []:
        key, equals, value = setting.partition("=")
        if not equals or key not in parsers:
            raise ValueError(
                f"--variant must set some of {', '.join(parsers)}, got {setting!r} in {text!r}"
            )
        try:
            settings[key] = parsers[key](value)
        except (KeyError, ValueError):
            raise ValueError(f"--variant {name} must have a valid {key}, got {value!r}") from None
    return name, settings


def cases_of(args: argparse.Namespace, vocab_size: int) -> list[Case]:
    """List what the options ask for: each variant for each seed and each number of experts.

    A variant that sets its number of experts, as the dense one does, is trained once for each seed.

    Raises:
        ValueError: two variants have one name, or a model cannot be built.
    """
    variants = {name: dict(BUILT_IN[name]) for name in args.variants}
    if "dense" in variants:
        width = dense_width(args.intermediate_size, args.num_experts_per_tok)
        variants["dense"]["intermediate_size"] = width
    for name, settings in args.variant:
        if name in variants:
            raise ValueError(f"--variant must have a name of its own, got {name} twice")
        variants[name] = settings
    cases = (
        _case(args, vocab_size, name, seed, {"num_experts": num_experts, **settings})
        for seed in args.seeds
        for num_experts in args.num_experts
        for name, settings in variants.items()
    )
    # Once each, also where a variant sets its number of experts.
    return list(dict.fromkeys(cases))


def _case(
    args: argparse.Namespace, vocab_size: int, name: str, seed: int, settings: dict[str, Any]
) -> Case:
    given = {**vars(args), **settings}
    table_optimizer = given["table_optimizer"] or DEFAULT_TABLE_OPTIMIZER
    sizes = {field.name: given[field.name] for field in fields(ModelConfig) if field.name in given}
    try:
        case = Case(
            name,
            seed,
            ModelConfig(**{**sizes, "vocab_size": vocab_size}),
            given["lr"] or default_lr(given["hidden_size"]),
            given["table_lr_scale"]
            or default_table_lr_scale(given["hidden_size"], table_optimizer),
            table_optimizer,
        )
        # Lets the layers check the sizes, without memory for their parameters.
        with torch.device("meta"):
            Transformer(case.config)
    except ValueError as error:
        raise ValueError(f"variant {name}: {error}") from error
    return case


def _parsers() -> dict[str, Callable[[str], Any]]:
    """Parser of each setting that a variant may have."""
    kinds: dict[Any, Callable[[str], Any]] = {
        int: _size,
        float: _not_negative,
        bool: lambda text: SWITCHES[text.lower()],
        ScoreNormName: lambda text: SCORE_NORMS[text.lower()],
    }
    found = {field.name: kinds[field.type] for field in fields(ModelConfig)}
    del found["vocab_size"]
    # 0 makes a dense model.
    return {
        **found,
        "num_experts": _count,
        "lr": _positive,
        "table_lr_scale": _positive,
        "table_optimizer": lambda text: OPTIMIZERS[text.lower()],
    }


def _count(text: str) -> int:
    if not 0 <= (value := int(text)) < MAX_OPTION:
        raise ValueError
    return value


def _size(text: str) -> int:
    if (value := _count(text)) == 0:
        raise ValueError
    return value


def _not_negative(text: str) -> float:
    if not 0 <= (value := float(text)) < MAX_OPTION:
        raise ValueError
    return value


def _positive(text: str) -> float:
    if (value := _not_negative(text)) == 0:
        raise ValueError
    return value

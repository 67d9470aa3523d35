"""Train a language model whose experts are sharded over the ranks of torchrun.

torchrun --standalone --nproc-per-node 2 launch/train.py --out out/run
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from tqdm import tqdm

from data import Corpus, Tokens, batch_at, load_corpus
from flash_moe_dist import (
    ExpertLoad,
    ExpertParallel,
    clip_grad_norm_,
    count_load,
    materialize,
)
from flash_moe_dist.agreement import same_error_on_all_ranks
from flash_moe_dist.checkpoint import check_replaceable, save_checkpoint
from flash_moe_dist.runtime import DEFAULT_TIMEOUT, Runtime, distributed
from model import ModelConfig, Transformer

MAX_GRAD_NORM = 1.0
DEFAULT_BATCH_SIZE = 16
MAX_OPTION = 2**31
CHECKPOINT, METRICS = "checkpoint", "metrics.jsonl"
# A seed of its own: the same validation batches in runs of any --seed.
VALIDATION_SEED = 2**31
PROMPT_TOKENS = 32


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="train.sh",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="text file, folder of text, .bin of uint16 token ids, or folder with train.bin and "
        "val.bin; without it, the source of Python's standard library",
    )
    add("--out", type=Path, default=Path("out/train"), help="folder for all results")
    add("--steps", type=int, default=250, help="optimizer steps")
    add(
        "--batch-size",
        type=int,
        help="sequences a step, over all ranks; without it 16, or the next multiple of the ranks",
    )
    add("--seq-len", type=int, default=256, help="tokens a sequence")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--seed", type=int, default=0, help="of parameters and batches")
    add("--hidden-size", type=int, default=128)
    add("--intermediate-size", type=int, default=256, help="width of the shared MLP")
    add("--num-layers", type=int, default=4)
    add("--num-heads", type=int, default=4)
    add("--num-experts", type=int, default=16384, help="experts of each layer")
    add("--num-experts-per-tok", type=int, default=32)
    add(
        "--ep-size",
        type=int,
        help="ranks that share out the experts, the others of the ranks hold copies of theirs; "
        "without it, all",
    )
    add("--validation-batches", type=int, default=8, help="batches of the validation loss")
    add("--validation-interval", type=int, default=100, help="steps between validations")
    add("--sample-tokens", type=int, default=200, help="tokens to generate at the end")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of activations; bfloat16 on GPUs and float32 on CPUs unless given",
    )
    add("--timeout", type=float, default=600, help="seconds a collective may wait for a rank")
    args = parser.parse_args(argv)
    for name in (
        *("steps", "batch_size", "seq_len", "hidden_size", "intermediate_size", "num_layers"),
        *("num_heads", "num_experts", "num_experts_per_tok", "validation_batches"),
        *("validation_interval", "lr", "timeout", "ep_size"),
    ):
        value = getattr(args, name)
        if value is not None and not 0 < value < MAX_OPTION:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in ("sample_tokens", "seed"):
        value = getattr(args, name)
        if not 0 <= value < MAX_OPTION:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {value}")
    return args


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that all ranks can report an error as one."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def runtime_for(args: argparse.Namespace, runtime: Runtime) -> Runtime:
    """With the meshes that the options ask for."""
    if args.ep_size is None:
        return runtime
    if runtime.world_size % args.ep_size:
        raise ValueError(
            f"--ep-size must divide the number of ranks = {runtime.world_size}, got {args.ep_size}"
        )
    if args.hidden_size % (runtime.world_size // args.ep_size):
        raise ValueError(
            f"--hidden-size must divide by the number of ranks over --ep-size = "
            f"{runtime.world_size // args.ep_size}, got {args.hidden_size}"
        )
    return Runtime.of_world(runtime.device, args.ep_size, runtime.timeout)


def prepare(args: argparse.Namespace, runtime: Runtime) -> tuple[Corpus, ModelConfig]:
    """Everything that bad input can break, before any work; fills in the batch size."""
    if args.batch_size is None:
        args.batch_size = -(-DEFAULT_BATCH_SIZE // runtime.world_size) * runtime.world_size
    if args.batch_size % runtime.world_size:
        raise ValueError(
            f"--batch-size must divide by the number of ranks = {runtime.world_size}, "
            f"got {args.batch_size}"
        )
    corpus = load_corpus(args.data, args.seq_len)
    if args.num_experts_per_tok > args.num_experts:
        raise ValueError(
            f"--num-experts-per-tok must be at most --num-experts = {args.num_experts}, "
            f"got {args.num_experts_per_tok}"
        )
    config = ModelConfig(
        corpus.vocab_size,
        args.hidden_size,
        args.intermediate_size,
        args.num_layers,
        args.num_heads,
        args.num_experts,
        args.num_experts_per_tok,
    )
    # Whatever the layers refuse, they refuse here, without memory for their parameters.
    with torch.device("meta"):
        Transformer(config)
    if runtime.is_main:
        check_out_folder(args.out)
    return corpus, config


def check_out_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / METRICS).open("a"):
            pass
        check_replaceable(out / CHECKPOINT)
    except OSError as error:
        raise ValueError(f"--out must be a folder to write results into, got {error}") from error


def build_model(config: ModelConfig, seed: int, runtime: Runtime) -> Transformer:
    """The model with its tables sharded over the ep and efsdp axes, the rest over all ranks.

    Built on the meta device, so that no rank ever holds a whole table.
    """
    with torch.device("meta"):
        model = Transformer(config)
    parallelize_module(model, runtime.ep_mesh, {"layers.*.moe.experts": ExpertParallel()})
    tables = set(expert_parameters(model))
    if runtime.efsdp_mesh.size() > 1:
        for layer in model.layers:
            fully_shard(
                layer.get_submodule("moe.experts"),
                mesh=runtime.efsdp_mesh,
                # Columns: rows are cut already.
                shard_placement_fn=lambda _: Shard(1),
            )
        tables = set()
    torch.manual_seed(seed)
    materialize(model, runtime.device)
    if runtime.world_size > 1:
        for layer in model.layers:
            fully_shard(layer, mesh=runtime.dp_mesh, ignored_params=tables)
        fully_shard(model, mesh=runtime.dp_mesh, ignored_params=tables)
    return model


def expert_parameters(model: Transformer) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if ".moe.experts." in name:
            yield parameter


def build_optimizer(model: Transformer, lr: float) -> torch.optim.AdamW:
    experts = list(expert_parameters(model))
    known = {id(parameter) for parameter in experts}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return torch.optim.AdamW(
        [{"params": dense}, {"params": experts}], lr=lr, betas=(0.9, 0.95), weight_decay=0.0
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise over the first twentieth, then fall in a straight line to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


class Run:
    """A model in training: what a step, a validation and a sample need at hand."""

    def __init__(
        self, args: argparse.Namespace, runtime: Runtime, corpus: Corpus, config: ModelConfig
    ) -> None:
        self.args, self.runtime, self.corpus = args, runtime, corpus
        self.model = build_model(config, args.seed, runtime)
        self.optimizer = build_optimizer(self.model, args.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, args.steps)
        )

    def step(self, step: int) -> float:
        """One optimizer step; returns the training loss, the mean over all ranks."""
        loss = self.loss(self.corpus.train, step, self.args.seed)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return self.mean_over_ranks(loss)

    @torch.no_grad()
    def validate(self) -> tuple[float, dict[str, ExpertLoad]]:
        """Mean loss over the same validation batches every time, over all ranks.

        With it the load of each layer's experts by these batches.
        """
        with count_load(self.model) as loads:
            losses = [
                self.loss(self.corpus.validation, batch, VALIDATION_SEED)
                for batch in range(self.args.validation_batches)
            ]
        return self.mean_over_ranks(torch.stack(losses).mean()), loads

    def loss(self, stream: Tokens, step: int, seed: int) -> Tensor:
        """Mean cross-entropy of this rank's part of a batch, in nats a token."""
        share = self.args.batch_size // self.runtime.world_size
        part = slice(self.runtime.rank * share, (self.runtime.rank + 1) * share)
        inputs_BS, targets_BS = batch_at(
            stream, step, seed, self.args.batch_size, self.args.seq_len, part
        )
        with self.precision():
            logits_BSV = self.model(inputs_BS.to(self.runtime.device))
        targets_N = targets_BS.to(self.runtime.device).flatten()
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_N)

    def sample(self) -> tuple[str, str]:
        """A prompt from the validation text, and how the model goes on."""
        prompt = torch.from_numpy(self.corpus.validation[:PROMPT_TOKENS].astype(np.int64))
        with self.precision():
            tokens = self.model.generate(
                prompt.to(self.runtime.device),
                self.args.sample_tokens,
                self.args.seq_len,
                self.args.seed,
            ).tolist()
        return self.as_text(tokens[: len(prompt)]), self.as_text(tokens[len(prompt) :])

    def as_text(self, tokens: list[int]) -> str:
        if self.corpus.is_text:
            return bytes(tokens).decode("utf-8", errors="replace")
        return " ".join(map(str, tokens))

    def precision(self) -> AbstractContextManager[object]:
        on_gpu = self.runtime.device.type == "cuda"
        chosen = self.args.precision or ("bfloat16" if on_gpu else "float32")
        if chosen == "float32":
            return nullcontext()
        return torch.autocast(self.runtime.device.type, dtype=torch.bfloat16)

    def mean_over_ranks(self, value: Tensor) -> float:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total.item() / self.runtime.world_size


def train(run: Run) -> tuple[list[float], dict[int, float]]:
    """All steps; writes metrics.jsonl; returns the losses and the validation losses by step."""
    args, runtime = run.args, run.runtime
    losses: list[float] = []
    validations: dict[int, float] = {}
    progress = tqdm(
        range(1, args.steps + 1), desc="training", unit="step", disable=not runtime.is_main
    )
    with MetricsFile(args.out / METRICS, runtime) as metrics:
        for step in progress:
            begin = time.perf_counter()
            losses.append(run.step(step))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"training loss is {losses[-1]} at step {step}: lower --lr")
            tokens_per_s = args.batch_size * args.seq_len / (time.perf_counter() - begin)
            progress.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_s=f"{tokens_per_s:,.0f}")
            loads: dict[str, ExpertLoad] = {}
            if step % args.validation_interval == 0 or step == args.steps:
                validations[step], loads = run.validate()
                if runtime.is_main:
                    touched = sum(load.touched for load in loads.values()) / len(loads)
                    uneven = max(load.rank_max_over_mean for load in loads.values())
                    progress.write(
                        f"step {step}: training loss {losses[-1]:.4f}, "
                        f"validation loss {validations[step]:.4f}, "
                        f"{touched:.0%} of experts touched, busiest rank {uneven:.2f} x mean"
                    )
            metrics.write(step, losses[-1], tokens_per_s, validations.get(step), loads)
    return losses, validations


class MetricsFile:
    """A line of JSON a step, on the main rank."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self.file = path.open("w", buffering=1) if runtime.is_main else None
        self.shape = {"world_size": runtime.world_size, "ep_size": runtime.ep_mesh.size()}

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(
        self,
        step: int,
        loss: float,
        tokens_per_s: float,
        validation_loss: float | None,
        loads: dict[str, ExpertLoad],
    ) -> None:
        line: dict[str, object] = {"step": step, "loss": loss, "tokens_per_s": tokens_per_s}
        line |= self.shape
        if validation_loss is not None:
            line["validation_loss"] = validation_loss
            line["expert_load"] = {name: asdict(load) for name, load in loads.items()}
        if self.file:
            self.file.write(json.dumps(line) + "\n")


def plot_losses(
    path: Path, losses: list[float], validations: dict[int, float], single_token_entropy: float
) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, label="training")
    axes.plot(list(validations), list(validations.values()), "o-", label="validation")
    axes.axhline(single_token_entropy, color="grey", linestyle="--", label="single-token entropy")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)


@record
def main() -> None:
    timeout, wrong = DEFAULT_TIMEOUT, None
    try:
        args = parse_args()
        timeout = timedelta(seconds=args.timeout)
    except ValueError as error:
        wrong = error
    with distributed(timeout) as runtime:
        try:
            with same_error_on_all_ranks():
                if wrong is not None:
                    raise wrong
                runtime = runtime_for(args, runtime)
                corpus, config = prepare(args, runtime)
        except (ValueError, TypeError, RuntimeError) as error:
            if runtime.is_main:
                print(f"train.sh: error: {error}", file=sys.stderr, flush=True)
            dist.barrier()
            sys.exit(2)
        run = Run(args, runtime, corpus, config)
        if runtime.is_main:
            count = sum(parameter.numel() for parameter in run.model.parameters())
            print(
                f"{count:,} parameters, {config.num_layers} layers of {config.num_experts:,} "
                f"experts over {runtime.world_size} ranks on {runtime.device.type}; "
                f"{len(corpus.train):,} training tokens from {corpus.source}",
                flush=True,
            )
        losses, validations = train(run)
        save_checkpoint(args.out / CHECKPOINT, run.model, run.optimizer, args.steps)
        prompt, continuation = run.sample()
        if runtime.is_main:
            entropy = corpus.single_token_entropy()
            plot_losses(args.out / "loss.png", losses, validations, entropy)
            print(
                f"training loss {losses[-1]:.4f}, validation loss {validations[args.steps]:.4f}, "
                f"single-token entropy of the validation data {entropy:.4f} nats\n"
                f"sample, after the prompt {prompt!r}:\n{continuation}\n"
                f"metrics, loss curve and checkpoint are in {args.out}",
                flush=True,
            )


if __name__ == "__main__":
    main()

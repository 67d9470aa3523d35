"""Train a language model whose experts are sharded over the ranks of torchrun.

torchrun --standalone --nproc-per-node 2 launch/train.py --out out/run
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

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
from errors import an_error_of_all_ranks_ends_the_run
from flash_moe_dist import (
    ExpertLoad,
    ExpertParallel,
    clip_grad_norm_,
    count_load,
    materialize,
    time_phases,
)
from flash_moe_dist.agreement import gather_objects, same_error_on_all_ranks
from flash_moe_dist.checkpoint import Checkpointer
from flash_moe_dist.dispatch.collectives import all_gather_rows
from flash_moe_dist.dispatch.symmetric_memory import symmetric_memory_bytes
from flash_moe_dist.runtime import DEFAULT_TIMEOUT, Runtime, distributed
from metrics import Line, MetricsFile, plot_losses, speed
from model import ModelConfig, Transformer
from options import parse_args
from sigterm import Sigterm

MAX_GRAD_NORM = 1.0
DEFAULT_BATCH_SIZE = 16
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
# A seed of its own: the same validation batches in runs of any --seed.
VALIDATION_SEED = 2**31
PROMPT_TOKENS = 32


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


def progress_to_resume(args: argparse.Namespace, checkpoints: Checkpointer) -> dict[str, Any]:
    """Of the checkpoint to go on from, empty to start; the same on every rank."""
    newest = checkpoints.newest()
    if newest is None:
        return {}
    saved = checkpoints.progress(newest)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    # A node that came back counts from 0 again.
    restarted = any(gather_objects(restarted, None))
    # torchrun also starts again what was refused: only what this torchrun has saved goes on.
    if not args.resume and not (restarted and saved.get("run_id") == run_id()):
        raise ValueError(
            f"--out {args.out} holds a checkpoint of step {newest}: --resume goes on from it, "
            "another --out starts anew"
        )
    return saved


def run_id() -> str:
    """What torchrun calls this run, over restarts."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def prepare(
    args: argparse.Namespace, runtime: Runtime, saved: dict[str, Any]
) -> tuple[Corpus, ModelConfig]:
    """Everything that bad input can break, before any work; fills in the batch size.

    saved: the progress of the checkpoint to go on from, empty to start.
    """
    world_size = runtime.world_size
    if args.batch_size is None:
        args.batch_size = saved.get("batch_size", DEFAULT_BATCH_SIZE)
        args.batch_size = -(-args.batch_size // world_size) * world_size
    if args.batch_size % world_size:
        raise ValueError(
            f"--batch-size must divide by the number of ranks = {world_size}, got {args.batch_size}"
        )
    saved_model = saved.get("model", {})
    vocab_size = args.vocab_size or saved_model.get("vocab_size")
    corpus = load_corpus(args.data, args.seq_len, vocab_size)
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
    differing = [
        f"{name} = {saved_model[name]}, here {value}"
        for name, value in asdict(config).items()
        if saved_model and saved_model[name] != value
    ]
    if differing:
        raise ValueError(f"the checkpoint in --out is of a model with {'; '.join(differing)}")
    # Whatever the layers refuse, they refuse here, without memory for their parameters.
    with torch.device("meta"):
        Transformer(config)
    return corpus, config


def check_out_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / METRICS).open("a"):
            pass
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
    # Fused: the tables are read and written once a step, and nothing as large is made on the way.
    return torch.optim.AdamW(
        [{"params": dense}, {"params": experts}],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise over the first twentieth, then fall in a straight line to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


@dataclass(frozen=True)
class StepReport:
    """losses: by rank, in nats a token; norm: of the gradient; stop: some rank asks to end.

    layer_seconds: of this rank, if asked for, as `flash_moe_dist.time_phases`.
    """

    losses: list[float]
    norm: float
    stop: bool
    layer_seconds: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm) and all(map(math.isfinite, self.losses))

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def what_is_not_finite(self) -> str:
        ranks = [
            f"{loss} on rank {rank}"
            for rank, loss in enumerate(self.losses)
            if not math.isfinite(loss)
        ]
        if ranks:
            return "training loss is " + ", ".join(ranks)
        return f"gradient norm is {self.norm}"


class Run:
    """A model in training: what a step, a validation and a sample need at hand."""

    def __init__(
        self, args: argparse.Namespace, runtime: Runtime, corpus: Corpus, config: ModelConfig
    ) -> None:
        self.args, self.runtime, self.corpus, self.config = args, runtime, corpus, config
        self.model = build_model(config, args.seed, runtime)
        self.optimizer = build_optimizer(self.model, args.lr)

    def step(self, step: int, stop_asked: Callable[[], bool] = lambda: False) -> StepReport:
        """One optimizer step, counted from 1; none if a loss or the gradient is not finite.

        stop_asked: whether this process has been asked to end by the end of the step.
        """
        learning_rate = self.args.lr * learning_rate_factor(step - 1, self.args.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        timed: AbstractContextManager[dict[str, float]] = (
            time_phases(self.runtime.device) if self.args.time_phases else nullcontext({})
        )
        with timed as layer_seconds:
            loss = self.loss(self.corpus.train, step, self.args.seed)
            loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        numbers = [loss.detach().float(), norm.float(), torch.tensor(float(stop_asked())).to(norm)]
        assert dist.group.WORLD is not None
        everyone = all_gather_rows(torch.stack(numbers).unsqueeze(0), dist.group.WORLD)
        losses, norms, stops = everyone.t().tolist()
        report = StepReport(losses, norms[0], any(stops), layer_seconds)
        if report.is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return report

    def progress(self) -> dict[str, Any]:
        """What a checkpoint must say for the data to go on where they were."""
        return {
            "seed": self.args.seed,
            "batch_size": self.args.batch_size,
            "seq_len": self.args.seq_len,
            "data": self.corpus.source,
            "training_tokens": len(self.corpus.train),
            "world_size": self.runtime.world_size,
            "model": asdict(self.config),
        }

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


def train(
    run: Run,
    first_step: int,
    checkpoints: Checkpointer,
    metrics: MetricsFile | None,
    sigterm: Sigterm,
) -> int:
    """Steps from `first_step` on, until all are done or one rank has got SIGTERM.

    Writes metrics on the main rank, and a checkpoint of the last step. Returns that step.
    """
    args, runtime, step = run.args, run.runtime, first_step - 1
    progress = tqdm(
        range(first_step, args.steps + 1),
        desc="training",
        unit="step",
        initial=step,
        total=args.steps,
        disable=not runtime.is_main,
    )
    for step in progress:
        begin = time.perf_counter()
        with sigterm.deadline():
            report = run.step(step, lambda: sigterm.received)
        seconds = time.perf_counter() - begin
        tokens_per_s = args.batch_size * args.seq_len / seconds
        line: Line = {"step": step, "loss": report.loss, "tokens_per_s": tokens_per_s}
        line |= {"world_size": runtime.world_size, "ep_size": runtime.ep_mesh.size()}
        if args.time_phases:
            line["share_of_step"] = {
                name: taken / seconds for name, taken in report.layer_seconds.items()
            }
        if report.is_finite:
            progress.set_postfix(loss=f"{report.loss:.3f}", tokens_per_s=f"{tokens_per_s:,.0f}")
        else:
            happened = f"{report.what_is_not_finite} at step {step}"
            if args.on_nonfinite == "stop":
                raise RuntimeError(
                    f"{happened}: lower --lr, or leave such steps out by --on-nonfinite skip"
                )
            line |= {"loss": None, "skipped": report.what_is_not_finite}
            if runtime.is_main:
                progress.write(f"{happened}: skipped")
        if step % args.validation_interval == 0 or step == args.steps:
            with sigterm.deadline():
                validation_loss, loads = run.validate()
            line["validation_loss"] = validation_loss
            line["expert_load"] = {name: asdict(load) for name, load in loads.items()}
            if runtime.is_main:
                touched = sum(load.touched for load in loads.values()) / len(loads)
                uneven = max(load.rank_max_over_mean for load in loads.values())
                progress.write(
                    f"step {step}: training loss {report.loss:.4f}, "
                    f"validation loss {validation_loss:.4f}, "
                    f"{touched:.0%} of experts touched, busiest rank {uneven:.2f} x mean"
                )
        if metrics is not None:
            metrics.write(line)
        if report.stop or step % args.checkpoint_interval == 0 or step == args.steps:
            progress_now = {**run.progress(), "run_id": run_id()}
            checkpoints.save(step, run.model, run.optimizer, progress_now)
        if report.stop:
            break
    checkpoints.wait()
    return step


def say(runtime: Runtime, text: str) -> None:
    if runtime.is_main:
        print(text, flush=True)


@record
def main() -> None:
    timeout, wrong = DEFAULT_TIMEOUT, None
    try:
        args = parse_args((__doc__ or "").splitlines()[0])
        timeout = timedelta(seconds=args.timeout)
    except ValueError as error:
        wrong = error
    with distributed(timeout) as runtime:
        with an_error_of_all_ranks_ends_the_run("train.sh", runtime):
            with same_error_on_all_ranks():
                if wrong is not None:
                    raise wrong
                runtime = runtime_for(args, runtime)
                if runtime.is_main:
                    check_out_folder(args.out)
            checkpoints = Checkpointer(
                args.out / CHECKPOINTS, args.keep, args.async_checkpoint, timeout
            )
            saved = progress_to_resume(args, checkpoints)
            last_step = saved.get("step", 0)
            with same_error_on_all_ranks():
                corpus, config = prepare(args, runtime, saved)
        run = Run(args, runtime, corpus, config)
        if last_step:
            with an_error_of_all_ranks_ends_the_run("train.sh", runtime, (ValueError,)):
                checkpoints.load(last_step, run.model, run.optimizer)
        count = sum(parameter.numel() for parameter in run.model.parameters())
        say(
            runtime,
            f"{count:,} parameters, {config.num_layers} layers of {config.num_experts:,} "
            f"experts over {runtime.world_size} ranks on {runtime.device.type}; "
            f"{len(corpus.train):,} training tokens from {corpus.source}",
        )
        if last_step:
            changed = [
                f"{name} {saved.get(name)} before, {now} now"
                for name, now in run.progress().items()
                if saved.get(name) != now
            ]
            say(runtime, "; ".join([f"going on after step {last_step} of {args.steps}", *changed]))
        metrics = MetricsFile(args.out / METRICS, last_step) if runtime.is_main else None
        with closing(metrics) if metrics else nullcontext(), Sigterm(args.grace) as sigterm:
            last_step = train(run, last_step + 1, checkpoints, metrics, sigterm)
        checkpoints.close()
        if last_step < args.steps:
            say(
                runtime,
                f"SIGTERM: ended after step {last_step} of {args.steps}, with a checkpoint; "
                "--resume goes on",
            )
            return
        finish(run, metrics)


def finish(run: Run, metrics: MetricsFile | None) -> None:
    """Loss curve and a sample of the model's text."""
    prompt, continuation = run.sample()
    if metrics is None:
        return
    entropy = run.corpus.single_token_entropy()
    plot_losses(run.args.out / "loss.png", metrics.lines, entropy)
    last = metrics.lines[-1] if metrics.lines else {}
    print(
        f"training loss {_as_text(last.get('loss'))}, "
        f"validation loss {_as_text(last.get('validation_loss'))}, "
        f"single-token entropy of the validation data {entropy:.4f} nats\n"
        f"sample, after the prompt {prompt!r}:\n{continuation}\n"
        f"{speed(metrics.lines)}{peak_memory(run.runtime.device)}\n"
        f"metrics, loss curve and checkpoints are in {run.args.out}",
        flush=True,
    )


def peak_memory(device: torch.device) -> str:
    """What this GPU held at most, as the end of a sentence; of a CPU nothing."""
    if device.type != "cuda":
        return ""
    held = torch.cuda.max_memory_allocated(device) + symmetric_memory_bytes()
    return f"; at most {held / 1e9:.1f} GB of GPU memory on rank 0"


def _as_text(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    main()

"""Train a language model whose experts are sharded over the ranks of torchrun.

torchrun --standalone --nproc-per-node 2 launch/train.py --out out/run
"""

from signals import StopSignals, end_with_torchrun

# Before the other imports, which take seconds.
end_with_torchrun()

import argparse
import gc
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm

from data import BYTE_VOCAB, VALIDATION_SEED, Corpus, Tokens, batch_at, load_corpus
from errors import exit_on_error, exit_on_shared_error
from failure_after_work import note_failure_after_work
from flash_moe import ProductKeyRouter, router_loss
from flash_moe_dist import (
    ExpertLoad,
    ExpertParallel,
    clip_grad_norm_,
    count_load,
    materialize,
    time_phases,
)
from flash_moe_dist.agreement import gather_objects, reason_in, same_error_on_all_ranks
from flash_moe_dist.checkpoint import Checkpointer
from flash_moe_dist.dispatch.collectives import all_gather_rows
from flash_moe_dist.dispatch.symmetric_memory import symmetric_memory_bytes
from flash_moe_dist.runtime import DEFAULT_TIMEOUT, Runtime, distributed, own_device
from metrics import Line, MetricsFile, plot_metrics, speed
from model import ModelConfig, Transformer, autocast, cross_entropy, evaluation_mode
from optimizer import (
    DEFAULT_TABLE_OPTIMIZER,
    MAX_GRAD_NORM,
    TableOptimizerName,
    build_optimizers,
    expert_parameters,
    learning_rate_factor,
    narrow_tables,
    set_learning_rate,
)
from options import DESCRIPTION, SCORE_NORMS, SCRIPT, default_lr, default_table_lr_scale, parse_args
from out_folder import hold_folder
from resume import (
    changes,
    model_changes,
    options_to_remember,
    read_start,
    recall,
    write_start,
)

DEFAULT_BATCH_SIZE = 16
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
PROMPT_TOKENS = 32


def runtime_for(args: argparse.Namespace, runtime: Runtime) -> Runtime:
    """Return `runtime`, or one with new meshes if --ep-size is given.

    Raises:
        ValueError: --ep-size or --hidden-size do not suit the number of ranks.
    """
    if args.ep_size is None:
        return runtime
    if runtime.world_size % args.ep_size:
        raise ValueError(
            f"--ep-size must divide the number of ranks = {runtime.world_size}, got {args.ep_size}"
        )
    if args.table_optimizer not in (None, "adamw") and args.ep_size < runtime.world_size:
        raise ValueError(
            "--table-optimizer must be adamw where --ep-size is less than the number of ranks = "
            f"{runtime.world_size}, as several ranks hold each table row then, got "
            f"{args.table_optimizer}; --resume keeps that of the checkpoint"
        )
    if args.hidden_size % (runtime.world_size // args.ep_size):
        raise ValueError(
            f"--hidden-size must be a multiple of the number of ranks over --ep-size = "
            f"{runtime.world_size // args.ep_size}, got {args.hidden_size}"
        )
    return Runtime.of_world(runtime.device, args.ep_size, runtime.timeout)


def progress_to_resume(args: argparse.Namespace, checkpoints: Checkpointer) -> dict[str, Any]:
    """Read the progress saved with the checkpoint to resume from; the same on every rank.

    Sets options that were not given to what they were then.

    Returns:
        What `Run.progress` gave, with "step" and "run_id"; without a checkpoint what it gave at
        the start of the run that is resumed, and empty for a new run.

    Raises:
        ValueError: --out holds a checkpoint that the options do not allow to resume from.
    """
    newest = checkpoints.newest()
    if newest is None:
        if not args.resume:
            return {}
        with same_error_on_all_ranks():
            start = read_start(args.out) if dist.get_rank() == 0 else {}
        start = gather_objects(start, None)[0]
        recall(args, start, dist.get_world_size())
        return start
    saved = checkpoints.progress(newest)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    # A machine that rejoins starts counting from 0.
    restarted = any(gather_objects(restarted, None))
    # torchrun also restarts a run that was refused here, which must not resume another run.
    if not args.resume and not (restarted and saved.get("run_id") == run_id()):
        raise ValueError(
            f"--out {args.out} holds a checkpoint of step {newest}: --resume continues "
            "from it, another --out starts a new run"
        )
    recall(args, saved, dist.get_world_size())
    return saved


def run_id() -> str:
    """Id that torchrun gives to this run; the same after restarts."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def prepare(
    args: argparse.Namespace, runtime: Runtime, saved: dict[str, Any]
) -> tuple[Corpus, ModelConfig]:
    """Check options, data and checkpoint before any work; load the data and configure the model.

    Replaces options of None that have a default by it: batch size, precision, learning rates,
    optimizer of the tables.

    Args:
        saved: progress of the checkpoint to resume from; empty for a new run.

    Raises:
        ValueError: invalid options or data, or a checkpoint of another model.
    """
    world_size = runtime.world_size
    if args.precision is None:
        args.precision = "bfloat16" if runtime.device.type == "cuda" else "float32"
    if args.lr is None:
        args.lr = default_lr(args.hidden_size)
    if args.table_optimizer is None:
        is_replicated = (args.ep_size or world_size) < world_size
        args.table_optimizer = "adamw" if is_replicated else DEFAULT_TABLE_OPTIMIZER
    if args.table_lr_scale is None:
        args.table_lr_scale = default_table_lr_scale(args.hidden_size, args.table_optimizer)
    if args.batch_size is None:
        args.batch_size = saved.get("batch_size", DEFAULT_BATCH_SIZE)
        args.batch_size = -(-args.batch_size // world_size) * world_size
    if args.batch_size % world_size:
        raise ValueError(
            f"--batch-size must be a multiple of the number of ranks = {world_size}, "
            f"got {args.batch_size}"
        )
    saved_model = saved.get("model", {})
    vocab_size = args.vocab_size or saved_model.get("vocab_size")
    corpus = load_corpus(args.data, args.seq_len, vocab_size)
    tokens, then = len(corpus.train), saved.get("training_tokens")
    if "data" not in args.given and then not in (None, tokens):
        raise ValueError(
            f"--data must be given to go on with other data: {corpus.source} has {tokens:,} "
            f"training tokens, the data of the checkpoint had {then:,}"
        )
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
        SCORE_NORMS[args.score_norm],
        args.aux_loss_coef,
        args.z_loss_coef,
        args.bias_update_rate,
        args.force_load_balance,
    )
    differing = model_changes(saved_model, asdict(config)) if saved_model else []
    if differing:
        raise ValueError(f"the checkpoint in --out is of a model with {'; '.join(differing)}")
    # Lets the layers check the sizes, without memory for their parameters.
    with torch.device("meta"):
        Transformer(config)
    return corpus, config


def build_model(
    config: ModelConfig,
    seed: int,
    runtime: Runtime,
    precision: str,
    table_optimizer: TableOptimizerName,
) -> Transformer:
    """Build the model: experts' tables sharded over the ep and efsdp axes, the rest over all ranks.

    Starts on the meta device, so that no rank ever holds a whole table.
    """
    with torch.device("meta"):
        model = Transformer(config)
    narrow_tables(model, precision, table_optimizer)
    parallelize_module(model, runtime.ep_mesh, {"layers.*.moe.experts": ExpertParallel()})
    tables = set(expert_parameters(model))
    if runtime.efsdp_mesh.size() > 1:
        for layer in model.layers:
            fully_shard(
                layer.get_submodule("moe.experts"),
                mesh=runtime.efsdp_mesh,
                # Shards columns, because rows are sharded over the ep axis.
                shard_placement_fn=lambda _: Shard(1),
            )
        tables = set()
    torch.manual_seed(seed)
    materialize(model, runtime.device)
    # Ranks draw different experts where the load is forced to be even.
    torch.manual_seed(seed + 1 + runtime.rank)
    if runtime.world_size > 1:
        for layer in model.layers:
            fully_shard(layer, mesh=runtime.dp_mesh, ignored_params=tables)
        fully_shard(model, mesh=runtime.dp_mesh, ignored_params=tables)
    return model


@dataclass(frozen=True)
class StepReport:
    """Outcome of a training step, the same on every rank but for `layer_seconds`.

    losses: loss of each rank, in nats per token.
    norm: norm of the gradient, before clipping.
    stop: number of the signal by which some rank was asked to stop; 0 if none was.
    layer_seconds: this rank's seconds by phase, see `flash_moe_dist.time_phases`; empty without
        --time-phases.
    """

    losses: list[float]
    norm: float
    stop: int
    layer_seconds: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm) and all(map(math.isfinite, self.losses))

    @property
    def loss(self) -> float:
        """Mean over the ranks, in nats per token."""
        return sum(self.losses) / len(self.losses)

    @property
    def what_is_not_finite(self) -> str:
        """Message that names the losses, or the gradient norm, that are not finite."""
        ranks = [
            f"{loss} on rank {rank}"
            for rank, loss in enumerate(self.losses)
            if not math.isfinite(loss)
        ]
        if ranks:
            return "training loss is " + ", ".join(ranks)
        return f"gradient norm is {self.norm}"


class Validation(NamedTuple):
    """Mean loss over all ranks in nats per token, and the load of each expert layer by name."""

    loss: float
    loads: dict[str, ExpertLoad]


class Sample(NamedTuple):
    """A prompt, and how the model continues it."""

    prompt: str
    continuation: str


class Ending(NamedTuple):
    """The last step of a run, and the number of the signal that asked to stop, 0 if none did."""

    step: int
    stop: int


class Run:
    """A model in training, with its optimizer, data and options."""

    def __init__(
        self, args: argparse.Namespace, runtime: Runtime, corpus: Corpus, config: ModelConfig
    ) -> None:
        self.args, self.runtime, self.corpus, self.config = args, runtime, corpus, config
        name: TableOptimizerName = args.table_optimizer
        self.model = build_model(config, args.seed, runtime, args.precision, name)
        self.optimizers = build_optimizers(self.model, args.lr, name)
        self.single_token_entropy = cache(corpus.single_token_entropy)

    def step(self, step: int, stop_asked: Callable[[], int] = lambda: 0) -> StepReport:
        """Run a training step; skips the optimizer if a loss or the gradient norm is not finite.

        Args:
            step: counted from 1.
            stop_asked: called at the end of the step; gives the number of the signal by which this
                process was asked to stop, 0 if it was not.
        """
        lr = self.args.lr * learning_rate_factor(step - 1, self.args.steps)
        set_learning_rate(self.model, self.optimizers, lr, self.args.table_lr_scale)
        timed: AbstractContextManager[dict[str, float]] = (
            time_phases(self.runtime.device) if self.args.time_phases else nullcontext({})
        )
        with timed as layer_seconds:
            loss = self.loss(self.corpus.train, step, self.args.seed)
            (loss + router_loss(self.model)).backward()
        norm = clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        numbers = [loss.detach().float(), norm.float(), torch.tensor(float(stop_asked())).to(norm)]
        assert dist.group.WORLD is not None
        everyone = all_gather_rows(torch.stack(numbers).unsqueeze(0), dist.group.WORLD)
        losses, norms, stops = everyone.t().tolist()
        report = StepReport(losses, norms[0], int(max(stops)), layer_seconds)
        if report.is_finite:
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            for module in self.model.modules():
                if isinstance(module, ProductKeyRouter):
                    module.forget_batch()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return report

    def progress(self) -> dict[str, Any]:
        """Collect what a resumed run needs to train as this one would have."""
        return {
            "options": options_to_remember(self.args),
            "batch_size": self.args.batch_size,
            "data": str(Path(self.corpus.source).absolute()),
            "training_tokens": len(self.corpus.train),
            "world_size": self.runtime.world_size,
            "model": asdict(self.config),
        }

    @torch.no_grad()
    def validate(self) -> Validation:
        """Compute the validation loss and the expert load on batches that are always the same.

        The model is in evaluation mode, so routers use and keep their running statistics.
        """
        with evaluation_mode(self.model), count_load(self.model) as loads:
            losses = [
                self.loss(self.corpus.validation, batch, VALIDATION_SEED)
                for batch in range(self.args.validation_batches)
            ]
        return Validation(self.mean_over_ranks(torch.stack(losses).mean()), loads)

    def loss(self, stream: Tokens, step: int, seed: int) -> Tensor:
        """Mean cross-entropy of this rank's share of a batch, in nats per token."""
        size = self.args.batch_size // self.runtime.world_size
        share = slice(self.runtime.rank * size, (self.runtime.rank + 1) * size)
        inputs_BS, targets_BS = batch_at(
            stream, step, seed, self.args.batch_size, self.args.seq_len, share
        )
        device, precision = self.runtime.device, self.args.precision
        return cross_entropy(self.model, inputs_BS, targets_BS, device, precision)

    def sample(self) -> Sample:
        """Let the model continue a prompt from the validation data, in evaluation mode.

        Collective over all ranks.
        """
        prompt = torch.from_numpy(self.corpus.validation[:PROMPT_TOKENS].astype(np.int64))
        with evaluation_mode(self.model), autocast(self.runtime.device, self.args.precision):
            tokens = self.model.generate(
                prompt.to(self.runtime.device),
                self.args.sample_tokens,
                self.args.seq_len,
                self.args.seed,
            ).tolist()
        return Sample(self.as_text(tokens[: len(prompt)]), self.as_text(tokens[len(prompt) :]))

    def as_text(self, tokens: list[int]) -> str:
        """Decode tokens of text, U+FFFD for ids that are no bytes; of other data, their ids."""
        if self.corpus.is_text:
            characters = (bytes([one]) if one < BYTE_VOCAB else b"\xef\xbf\xbd" for one in tokens)
            return b"".join(characters).decode("utf-8", errors="replace")
        return " ".join(map(str, tokens))

    def mean_over_ranks(self, value: Tensor) -> float:
        """Average a scalar over all ranks; collective, waits for the device."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total.item() / self.runtime.world_size


def train(
    run: Run,
    first_step: int,
    checkpoints: Checkpointer,
    metrics: MetricsFile | None,
    signals: StopSignals,
) -> Ending:
    """Train from `first_step` until all steps are done or some rank was asked to stop.

    Validates, plots the metrics and saves checkpoints at their intervals and after the last step.

    Args:
        metrics: written on the main rank; None on the others.

    Raises:
        RuntimeError: on all ranks, if a loss or the gradient norm is not finite and --on-nonfinite
            is stop.
    """
    args, runtime, step, stop = run.args, run.runtime, first_step - 1, 0
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
        with signals.deadline():
            report = run.step(step, lambda: signals.received)
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
                    f"{happened}: lower --lr, or skip such steps with --on-nonfinite skip"
                )
            line |= {"loss": None, "skipped": report.what_is_not_finite}
            if runtime.is_main:
                progress.write(f"{happened}: skipped")
        if step % args.validation_interval == 0 or step == args.steps:
            with signals.deadline():
                validation = run.validate()
            loads = validation.loads
            line["validation_loss"] = validation.loss
            line["expert_load"] = {name: asdict(load) for name, load in loads.items()}
            if runtime.is_main:
                usage = sum(load.usage for load in loads.values()) / len(loads)
                # Unlike max, NaN if any is.
                unevenness = np.max([load.unevenness for load in loads.values()])
                busiest = max(load.rank_max_over_mean for load in loads.values())
                progress.write(
                    f"step {step}: training loss {report.loss:.4f}, "
                    f"validation loss {validation.loss:.4f}, "
                    f"mean usage {usage:.1%}, largest unevenness {unevenness:.2f} nats, "
                    f"busiest rank {busiest:.2f} x mean"
                )
        if metrics is not None:
            metrics.write(line)
            if "validation_loss" in line:
                plot(run, metrics)
        if report.stop or step % args.checkpoint_interval == 0 or step == args.steps:
            progress_now = {**run.progress(), "run_id": run_id()}
            checkpoints.save(step, run.model, run.optimizers, progress_now)
        if stop := report.stop:
            break
    checkpoints.wait()
    if stop and metrics is not None:
        plot(run, metrics)
    return Ending(step, stop)


def plot(run: Run, metrics: MetricsFile) -> None:
    """Plot the metrics; a failure is noted, and does not end the run."""
    try:
        plot_metrics(run.args.out / "loss.png", metrics.lines, run.single_token_entropy())
    except Exception as error:
        print(f"{SCRIPT}: the metrics cannot be plotted: {reason_in(error)}", file=sys.stderr)


def print_on_main_rank(runtime: Runtime, text: str) -> None:
    """Print a line on the main rank."""
    if runtime.is_main:
        print(text, flush=True)


@record
def main() -> None:
    """Parse the options on every rank, join the process group, and train."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Paths and samples may have characters that the encoding of the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    timeout, option_error = DEFAULT_TIMEOUT, None
    try:
        args = parse_args(DESCRIPTION)
        timeout = timedelta(seconds=args.timeout)
    except ValueError as error:
        option_error = error
    with exit_on_error(SCRIPT, RuntimeError):
        own_device()
    with distributed(timeout) as runtime:
        with exit_on_shared_error(SCRIPT, runtime):
            with same_error_on_all_ranks():
                if option_error is not None:
                    raise option_error
                held = hold_folder(args.out, create=False) if runtime.is_main else None
            checkpoints = Checkpointer(
                args.out / CHECKPOINTS, args.keep, args.async_checkpoint, timeout
            )
            saved = progress_to_resume(args, checkpoints)
            last_step = saved.get("step", 0)
            with same_error_on_all_ranks():
                runtime = runtime_for(args, runtime)
                corpus, config = prepare(args, runtime, saved)
                # Last, so that a run that is refused leaves no folder.
                if runtime.is_main and held is None:
                    held = hold_folder(args.out, create=True)
        run = Run(args, runtime, corpus, config)
        if last_step:
            with exit_on_shared_error(SCRIPT, runtime, (ValueError,)):
                checkpoints.load(last_step, run.model, run.optimizers)
        count = sum(parameter.numel() for parameter in run.model.parameters())
        print_on_main_rank(
            runtime,
            f"{count:,} parameters, {counted(config.num_layers, 'layer')} of "
            f"{counted(config.num_experts, 'expert')} over "
            f"{counted(runtime.world_size, 'rank')} on {runtime.device.type}; "
            f"{len(corpus.train):,} training tokens from {corpus.source}",
        )
        if last_step:
            resumed = f"resuming after step {last_step} of {args.steps}"
            if last_step >= args.steps:
                resumed += ": nothing to do, a larger --steps continues"
            print_on_main_rank(runtime, resumed)
        elif args.resume:
            start = "from the start, as it was given then" if saved else "a new run"
            print_on_main_rank(runtime, f"no checkpoint in {args.out}: {start}")
        for line in changes(saved, run.progress()):
            print_on_main_rank(runtime, line)
        if runtime.is_main and not last_step:
            write_start(args.out, run.progress())
        metrics = MetricsFile(args.out / METRICS, last_step) if runtime.is_main else None
        if metrics is not None:
            # Imports matplotlib, for which the other ranks would wait at the first validation.
            plot(run, metrics)
        with closing(metrics) if metrics else nullcontext(), StopSignals(args.grace) as signals:
            ending = train(run, last_step + 1, checkpoints, metrics, signals)
        checkpoints.close()
        if ending.step < args.steps:
            name = signal.Signals(ending.stop).name
            print_on_main_rank(
                runtime,
                f"{name}: ended after step {ending.step} of {args.steps}, with a checkpoint; "
                "--resume continues",
            )
        else:
            finish(run, metrics)


def finish(run: Run, metrics: MetricsFile | None) -> None:
    """Print a summary with a sample of the model's text; a failure is noted, and changes nothing.

    metrics: file of metrics on the main rank; None on the others.
    """
    with note_failure_after_work(f"{SCRIPT}: all steps are done, but the summary failed"):
        sample = run.sample()
        if metrics is not None:
            print_summary(run, metrics, sample)


def print_summary(run: Run, metrics: MetricsFile, sample: Sample) -> None:
    """Plot the metrics, and print the last ones, the sample, speed and memory."""
    plot(run, metrics)
    last = metrics.lines[-1] if metrics.lines else {}
    text = (
        f"training loss {_as_text(last.get('loss'))}, "
        f"validation loss {_as_text(last.get('validation_loss'))}, "
        f"single-token entropy of the validation data {run.single_token_entropy():.4f} nats\n"
        f"sample, after the prompt {sample.prompt!r}:\n{sample.continuation}\n"
        f"{speed(metrics.lines)}{peak_memory(run.runtime.device)}\n"
        f"metrics, plot and checkpoints are in {run.args.out}"
    )
    try:
        print(text, flush=True)
    except OSError:
        # The reader of a pipe has gone, say: Python would fail to flush once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def counted(number: int, noun: str) -> str:
    """Number and noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def peak_memory(device: torch.device) -> str:
    """Peak memory of this GPU as the end of the summary line; empty on the CPU."""
    if device.type != "cuda":
        return ""
    # Symmetric memory is allocated outside PyTorch's caching allocator.
    peak = torch.cuda.max_memory_allocated(device) + symmetric_memory_bytes()
    return f"; at most {peak / 1e9:.1f} GB of GPU memory on rank 0"


def _as_text(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    # Garbage collections skip what was imported.
    gc.freeze()
    main()

"""Training of one variant, timed and validated at fixed steps."""

import argparse
import gc
import hashlib
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from comparison.results import Point, Row
from comparison.variants import Case
from data import VALIDATION_SEED, Corpus, Tokens, batch_at
from flash_moe import router_loss
from flash_moe_dist import clip_grad_norm_, count_load, materialize
from model import Transformer, cross_entropy, evaluation_mode
from optimizer import (
    MAX_GRAD_NORM,
    build_optimizers,
    learning_rate_factor,
    narrow_tables,
    set_learning_rate,
)

# Steps that also compile and allocate; each counts as the median of the others.
SLOW_STEPS = 5


def train(
    case: Case,
    row: Row,
    corpus: Corpus,
    args: argparse.Namespace,
    device: torch.device,
    deadline: float,
    save: Callable[[], None],
) -> None:
    """Train a case from its start, and fill in `row`; what it allocates is free afterwards.

    Args:
        deadline: time.monotonic() at which to stop after a validation.
        save: called after each validation.
    """
    free_memory(device)
    try:
        _Training(case, corpus, args, device).run(row, deadline, save)
    except torch.OutOfMemoryError as error:
        row.failure = f"out of memory: {str(error).splitlines()[0]}"
    free_memory(device)


def free_memory(device: torch.device) -> None:
    """Give back what models that are no longer used have allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class _Training:
    """A model with its optimizer, and the duration of each of its steps in seconds."""

    def __init__(
        self, case: Case, corpus: Corpus, args: argparse.Namespace, device: torch.device
    ) -> None:
        self.case, self.corpus, self.args, self.device = case, corpus, args, device
        with torch.device("meta"):
            self.model = Transformer(case.config)
        narrow_tables(self.model, args.precision, case.table_optimizer)
        torch.manual_seed(case.seed)
        materialize(self.model, device)
        self.optimizers = build_optimizers(self.model, case.lr, case.table_optimizer)
        self.seconds: list[float] = []

    def run(self, row: Row, deadline: float, save: Callable[[], None]) -> None:
        args, checksum, losses = self.args, hashlib.sha256(), []
        row.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        last_point = None
        for step in tqdm(range(args.steps + 1), desc=str(self.case), unit="step"):
            if step:
                batch = self.batch(self.corpus.train, step, self.case.seed)
                for tokens in batch:
                    checksum.update(tokens.numpy().tobytes())
                loss, norm = self.step(step, *batch)
                if not math.isfinite(loss) or not math.isfinite(norm):
                    row.failure = f"loss {loss}, gradient norm {norm} at step {step}"
                    return
                losses.append(loss)
            if step % args.validation_interval and step != args.steps:
                continue
            point = self.validate(step, losses, checksum.hexdigest())
            figures = [point.validation_loss, *point.unevenness]
            if not all(map(math.isfinite, figures)):
                row.failure = f"validation loss and unevenness {figures} at step {step}"
                return
            losses = []
            row.curve.append(point)
            self.add_times(row)
            row.finished = step == args.steps
            save()
            now = time.monotonic()
            expected_end = now if last_point is None else now + (now - last_point)
            last_point = now
            if expected_end > deadline:
                return

    def batch(self, stream: Tokens, step: int, seed: int) -> tuple[Tensor, Tensor]:
        size = self.args.batch_size
        return batch_at(stream, step, seed, size, self.args.seq_len, slice(size))

    def step(self, step: int, inputs_BS: Tensor, targets_BS: Tensor) -> tuple[float, float]:
        """Take a step; return its loss in nats per token, and the norm of its gradient."""
        begin = self.now()
        lr = self.case.lr * learning_rate_factor(step - 1, self.args.steps)
        set_learning_rate(self.model, self.optimizers, lr, self.case.table_lr_scale)
        loss = cross_entropy(self.model, inputs_BS, targets_BS, self.device, self.args.precision)
        (loss + router_loss(self.model)).backward()
        norm = clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.seconds.append(self.now() - begin)
        return loss.item(), norm.item()

    @torch.no_grad()
    def validate(self, step: int, losses: list[float], checksum: str) -> Point:
        """Measure validation loss and load of the experts.

        losses: training losses of the steps since the validation before.
        """
        with evaluation_mode(self.model), count_load(self.model) as loads:
            validation = [
                cross_entropy(
                    self.model,
                    *self.batch(self.corpus.validation, number, VALIDATION_SEED),
                    self.device,
                    self.args.precision,
                )
                for number in range(self.args.validation_batches)
            ]
        return Point(
            step=step,
            tokens=step * self.args.batch_size * self.args.seq_len,
            seconds=0.0,
            training_loss=statistics.mean(losses) if losses else None,
            validation_loss=torch.stack(validation).mean().item(),
            usage=[load.usage for load in loads.values()],
            unevenness=[load.unevenness for load in loads.values()],
            batches=checksum,
        )

    def add_times(self, row: Row) -> None:
        """Set what depends on all steps so far: seconds of each point, speed, peak memory."""
        if not self.seconds:
            return
        usual = statistics.median(self.seconds[SLOW_STEPS:] or self.seconds)
        for point in row.curve:
            slow = min(point.step, SLOW_STEPS) * usual
            point.seconds = slow + sum(self.seconds[SLOW_STEPS : point.step])
        row.tokens_per_s = self.args.batch_size * self.args.seq_len / usual
        if self.device.type == "cuda":
            row.peak_bytes = torch.cuda.max_memory_allocated(self.device)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

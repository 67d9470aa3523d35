"""Kernels that update a table's rows against the operations of PyTorch that do the same."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from cases import INTERPRETED_TOLERANCES, assert_close
from torch import Tensor, nn

from flash_moe.ops import row_updates
from flash_moe.ops.pair_grads import PairGrad, collect_pair_grads
from flash_moe.ops.pairs import Pairs
from flash_moe.ops.row_updates import (
    RowState,
    RowUpdateOptions,
    has_row_kernels,
    update_rows,
)
from flash_moe.optim import SGD, LazyAdam, RowwiseAdagrad, RowwiseAdam
from flash_moe.optim.split_float import join
from flash_moe.optim.stochastic_rounding import round_stochastically, start_of_seed
from flash_moe.optim.table_optimizer import TableOptimizer
from flash_moe_dist import clip_grad_norm_

HIDDEN_SIZE, NUM_EXPERTS, HOT = 20, 40, 3
TOKENS, SLOTS = 17, 6
# Sums of up to 60 float32 numbers in another order.
FLOAT32 = 1e-5
ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
KINDS: list[Any] = [
    pytest.param(RowwiseAdam, {**ADAM, "moment_dtype": torch.float32}, id="RowwiseAdam"),
    pytest.param(LazyAdam, {**ADAM, "moment_dtype": torch.float32}, id="LazyAdam"),
    pytest.param(RowwiseAdam, {**ADAM, "betas": (0.0, 0.0)}, id="RowwiseAdam without memory"),
    pytest.param(
        RowwiseAdagrad, {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.1}, id="RowwiseAdagrad"
    ),
    pytest.param(SGD, {"lr": 0.1, "weight_decay": 0.1}, id="SGD"),
    pytest.param(SGD, {"lr": 0.1, "max_row_norm": 0.5}, id="SGD, rows clipped"),
    pytest.param(RowwiseAdagrad, {"lr": 0.1, "max_row_norm": 0.5}, id="Adagrad, rows clipped"),
]


def pair_grad(
    seed: int, device: torch.device, is_ragged: bool = False, hidden_size: int = HIDDEN_SIZE
) -> PairGrad:
    """Pairs of which most use one expert, and none the last ten; some slots are empty.

    is_ragged: the first token has no pairs, the last twice as many as others.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, NUM_EXPERTS - 10, (TOKENS, SLOTS), generator=draw)
    ids[:, :3] = HOT
    rows = torch.randn(TOKENS, hidden_size, generator=draw).to(device, torch.bfloat16)
    values = torch.randn(TOKENS * SLOTS, generator=draw).to(device)
    pairs = Pairs.from_checked_indices(ids.to(device), NUM_EXPERTS)
    if is_ragged:
        starts = [0, *range(0, (TOKENS - 1) * SLOTS, SLOTS), TOKENS * SLOTS]
        offsets = torch.tensor(starts, device=device)
        pairs = Pairs.from_checked_offsets(offsets, ids.flatten().int().to(device), NUM_EXPERTS)
    return PairGrad(pairs, values, rows)


class Table(NamedTuple):
    """A table and its optimizer."""

    weights: nn.Parameter
    optimizer: TableOptimizer

    @classmethod
    def new(
        cls,
        kind: Any,
        options: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        hidden_size: int = HIDDEN_SIZE,
    ) -> "Table":
        torch.manual_seed(0)
        weights = nn.Parameter(torch.randn(NUM_EXPERTS, hidden_size).to(device, dtype))
        return cls(weights, kind([weights], **options))

    def take(self, grads: list[PairGrad]) -> None:
        """Take a step without clipping."""
        collected = collect_pair_grads(self.weights)
        for grad in grads:
            collected.add(grad)
        self.optimizer.step()

    def step(self, grads: list[PairGrad], max_norm: float = math.inf) -> Tensor:
        collected = collect_pair_grads(self.weights)
        for grad in grads:
            collected.add(grad)
        norm = clip_grad_norm_([self.weights], max_norm)
        self.optimizer.step()
        return norm

    def wide(self) -> Tensor:
        """The float32 weights that a bfloat16 table and its low bits are."""
        low_bits = self.tensors()["low_bits"].view(torch.int16)
        return join(self.weights.detach(), low_bits)

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights.detach(), **self.optimizer.state[self.weights]}


def two_tables(*arguments: Any) -> tuple[Table, Table]:
    return Table.new(*arguments), Table.new(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("split_pairs", [8, 1024])
def test_steps_and_norms(
    kind: Any,
    options: dict[str, Any],
    dtype: torch.dtype,
    split_pairs: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_kernel, by_operations = two_tables(kind, options, dtype, device)
    for seed in range(3):
        # One pattern, ragged ones, and several passes in one step.
        grads = [pair_grad(seed, device, is_ragged=seed == 1)]
        grads += [pair_grad(9, device)] if seed == 2 else []
        assert has_row_kernels(grads[0].values, grads[0].rows)
        with row_updates.tuning(split_pairs=split_pairs):
            norm = by_kernel.step(grads, max_norm=20.0)
        with monkeypatch.context() as patch:
            patch.setenv("FLASH_MOE_BACKEND", "reference")
            expected = by_operations.step(grads, max_norm=20.0)
        assert expected > 20
        assert_close(norm, expected, FLOAT32, "norm")
    if dtype == torch.bfloat16:
        assert_close(by_kernel.wide(), by_operations.wide(), FLOAT32, "weights and low bits")
    wanted = by_operations.tensors()
    for name, tensor in by_kernel.tensors().items():
        if name != "low_bits":
            narrow = INTERPRETED_TOLERANCES[torch.bfloat16]
            tolerance = narrow if tensor.dtype == torch.bfloat16 else FLOAT32
            assert_close(tensor, wanted[name], tolerance, name)
    start = Table.new(kind, options, dtype, device).weights
    untouched = slice(NUM_EXPERTS - 10, None)
    assert torch.equal(by_kernel.weights[untouched], start[untouched])
    assert not torch.equal(by_kernel.weights, start)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [1000, 1024, 8192])
def test_rows_of_several_warps(
    hidden_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ({**ADAM, "moment_dtype": torch.float32}, torch.bfloat16, device, hidden_size)
    by_kernel, again, by_operations = (Table.new(RowwiseAdam, *given) for _ in range(3))
    for seed in range(5):
        grads = [pair_grad(seed, device, hidden_size=hidden_size)]
        with row_updates.tuning(split_pairs=8):
            by_kernel.step(grads, max_norm=20.0)
            again.step(grads, max_norm=20.0)
        with monkeypatch.context() as patch:
            patch.setenv("FLASH_MOE_BACKEND", "reference")
            by_operations.step(grads, max_norm=20.0)
    assert_close(by_kernel.wide(), by_operations.wide(), FLOAT32, "weights and low bits")
    for name, tensor in by_kernel.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def test_norms_too_long_and_too_short_for_squares_in_float32(device: torch.device) -> None:
    for size in (1e-25, 1e20):
        grad = pair_grad(0, device)
        grad.values.mul_(size)
        table = Table.new(SGD, {}, torch.float32, device)
        expected = Table.new(SGD, {}, torch.float32, device).step([pair_grad(0, device)])
        assert_close(table.step([grad]) / size, expected, FLOAT32, "norm")


def test_stochastic_rounding_counts_rows_of_the_whole_table(device: torch.device) -> None:
    grad = pair_grad(0, device)
    found = []
    for first_row in (0, 7):
        table = Table.new(SGD, {}, torch.bfloat16, device).weights.detach()
        wide = table.float()
        touches = torch.zeros(NUM_EXPERTS, dtype=torch.int32, device=device)
        for one, kept in ((table, touches), (wide, None)):
            state = RowState(one, low_bits=None, first=None, second=None, touches=kept)
            options = RowUpdateOptions(lr=2.0**-6, seed_bits=start_of_seed(3), first_row=first_row)
            update_rows(grad.values, grad.rows, grad.pairs, None, state, options)
        rows = torch.arange(NUM_EXPERTS, device=device)[touches > 0]
        expected = round_stochastically(wide[rows], rows + first_row, 0 * rows, 3)
        assert torch.equal(table[rows], expected)
        found.append(table)
    assert not torch.equal(*found)


def test_stochastic_rounding_draws_the_same_numbers(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lr": 2.0**-6, "stochastic_rounding": True, "seed": 2**40 + 5}
    for kind in (SGD, RowwiseAdam):
        by_kernel, by_operations = two_tables(kind, options, torch.bfloat16, device)
        nearest = Table.new(kind, {"lr": 2.0**-6}, torch.bfloat16, device)
        for seed in range(2):
            grads = [pair_grad(seed, device)]
            by_kernel.step(grads)
            nearest.step(grads)
            with monkeypatch.context() as patch:
                patch.setenv("FLASH_MOE_BACKEND", "reference")
                by_operations.step(grads)
        # Another last bit before rounding may round another way.
        same = by_kernel.weights == by_operations.weights
        assert same.float().mean() > 0.99
        assert (by_kernel.weights != nearest.weights).float().mean() > 0.1
        one, other = by_kernel.tensors()["touches"], by_operations.tensors()["touches"]
        assert torch.equal(one, other)


def test_a_norm_that_is_not_finite_changes_nothing(device: torch.device) -> None:
    for factor in (math.nan, math.inf):
        table = Table.new(RowwiseAdam, {}, torch.bfloat16, device)
        table.step([pair_grad(0, device)])
        before = {name: tensor.clone() for name, tensor in table.tensors().items()}
        bad = pair_grad(1, device)
        bad.values[0] = factor
        with row_updates.tuning(split_pairs=8):
            assert not table.step([bad], max_norm=1.0).isfinite()
        for name, tensor in table.tensors().items():
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_whose_gradient_is_not_finite_is_left_as_it_is(
    backend: str, bad: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_MOE_BACKEND", backend)
    table = Table.new(RowwiseAdam, {"max_row_norm": 1.0}, torch.bfloat16, device)
    good, broken = pair_grad(0, device), pair_grad(1, device)
    table.take([good])
    before = {name: tensor.clone() for name, tensor in table.tensors().items()}
    # Many pairs of the hot expert, one pair of another.
    rows = {HOT, int(broken.pairs.expert_ids[broken.pairs.expert_ids != HOT].max())}
    for row in rows:
        broken.values[(broken.pairs.expert_ids == row).nonzero()[0]] = bad
    with row_updates.tuning(split_pairs=8):
        table.take([broken])
    touched = set(broken.pairs.expert_ids.tolist()) - {-1}
    for name, tensor in table.tensors().items():
        changed = {row for row in range(NUM_EXPERTS) if not tensor[row].equal(before[name][row])}
        assert changed <= touched - rows, name
        assert name != "touches" or changed == touched - rows


def test_a_clipped_row_moves_as_far_as_allowed(device: torch.device) -> None:
    table = Table.new(SGD, {"lr": 1.0, "max_row_norm": 0.25}, torch.float32, device)
    before = table.weights.detach().clone()
    table.take([pair_grad(0, device)])
    moved = (table.weights.detach() - before).norm(dim=1)
    touched = pair_grad(0, device).pairs.expert_ids.unique()
    touched = touched[touched >= 0].long()
    assert_close(moved[touched], torch.full_like(moved[touched], 0.25), 1e-5, "length of the move")


def test_a_learning_rate_that_is_a_tensor(device: torch.device) -> None:
    one, other = two_tables(SGD, {"lr": 0.5}, torch.float32, device)
    other.optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device=device)
    for table in (one, other):
        table.step([pair_grad(0, device)])
    assert torch.equal(one.weights, other.weights)


def test_steps_are_bitwise_repeatable(device: torch.device) -> None:
    one, other = two_tables(RowwiseAdam, {}, torch.bfloat16, device)
    for table in (one, other):
        with row_updates.tuning(split_pairs=8):
            table.step([pair_grad(0, device), pair_grad(1, device, is_ragged=True)], max_norm=1.0)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_no_pairs(device: torch.device) -> None:
    table = Table.new(RowwiseAdam, {}, torch.float32, device)
    before = table.weights.clone()
    pairs = Pairs.from_checked_indices(torch.zeros(0, 4, dtype=torch.int64, device=device), 40)
    nothing = PairGrad(
        pairs, torch.zeros(0, device=device), torch.zeros(0, HIDDEN_SIZE, device=device)
    )
    assert table.step([nothing]) == 0
    assert torch.equal(table.weights, before)


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph_does_not_wait(device: torch.device) -> None:
    captured, eager = two_tables(RowwiseAdam, {}, torch.bfloat16, device)
    grads = [pair_grad(seed, device) for seed in range(4)]
    given = pair_grad(0, device)
    for table in (captured, eager):
        table.step([grads[0]], max_norm=1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step([given], max_norm=1.0)
    for grad in grads[1:]:
        for name in ("values", "rows"):
            getattr(given, name).copy_(getattr(grad, name))
        given.pairs.expert_ids.copy_(grad.pairs.expert_ids)
        graph.replay()
        eager.step([grad], max_norm=1.0)
    for name, tensor in captured.tensors().items():
        assert torch.equal(tensor, eager.tensors()[name]), name

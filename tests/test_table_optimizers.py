"""Optimizers of tables against plain forms of their formulas, and in a training loop."""

import copy
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_close
from hypothesis import given
from hypothesis import strategies as st
from ranks import RankPools, rank_device, rank_runtime
from sharded import whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashExperts
from flash_moe.ops.pair_grads import PairGrad, collect_pair_grads, pair_grads_of
from flash_moe.ops.pairs import Pairs
from flash_moe.optim import SGD, LazyAdam, RowwiseAdagrad, RowwiseAdam
from flash_moe.optim.split_float import join, split
from flash_moe.optim.stochastic_rounding import round_stochastically
from flash_moe.optim.table_optimizer import TableOptimizer
from flash_moe_dist import Checkpointer, ExpertParallel, clip_grad_norm_
from flash_moe_dist.joined_optimizers import JoinedOptimizers

HIDDEN_SIZE, NUM_EXPERTS, SLOTS = 12, 30, 4
TIGHT = 1e-11
# Of the moments, in float64 tables: they are float32.
MOMENTS = 2e-6


class Reference:
    """The formulas, row by row in Python floats and float64, for dense gradients of one table."""

    def __init__(self, table: Tensor, kind: type, options: dict[str, Any]) -> None:
        self.table, self.kind, self.options = table.detach().double().clone(), kind, options
        self.first = torch.zeros_like(self.table)
        self.second = torch.zeros_like(self.table)
        self.touches = [0] * len(table)

    def step(self, grads: Tensor, touched: list[int]) -> None:
        lr, decay = self.options["lr"], self.options.get("weight_decay", 0.0)
        for row in touched:
            g, w = grads[row].double(), self.table[row].clone()
            self.touches[row] += 1
            t = self.touches[row]
            if self.kind in (RowwiseAdam, LazyAdam):
                b1, b2 = self.options["betas"]
                squares = g.square() if self.kind is LazyAdam else g.square().mean()
                self.first[row] = b1 * self.first[row] + (1 - b1) * g
                self.second[row] = b2 * self.second[row] + (1 - b2) * squares
                root = (self.second[row] / (1 - b2**t)).sqrt() + self.options["eps"]
                move = self.first[row] / (1 - b1**t) / root
            elif self.kind is RowwiseAdagrad:
                self.second[row] += g.square().mean()
                move = g / (self.second[row].sqrt() + self.options["eps"])
            else:
                move = g
            self.table[row] = w - lr * move - lr * decay * w


ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
ADAGRAD = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.1}
KINDS: list[Any] = [
    pytest.param(RowwiseAdam, {**ADAM, "moment_dtype": torch.float32}, id="RowwiseAdam"),
    pytest.param(LazyAdam, {**ADAM, "moment_dtype": torch.float32}, id="LazyAdam"),
    pytest.param(
        RowwiseAdagrad, {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.1}, id="RowwiseAdagrad"
    ),
    pytest.param(SGD, {"lr": 0.1, "weight_decay": 0.1}, id="SGD"),
]


def new_experts(dtype: torch.dtype = torch.float64, device: Any = "cpu") -> FlashExperts:
    torch.manual_seed(0)
    return FlashExperts(NUM_EXPERTS, HIDDEN_SIZE).to(device, dtype)


class Batch:
    """Tokens with their routing, of which experts 20 and up are never used; one slot is empty."""

    def __init__(self, tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(tokens, HIDDEN_SIZE, generator=draw).to(dtype)
        self.indices = torch.randint(20, (tokens, SLOTS), generator=draw)
        self.indices[:1, 0] = -1
        self.weights = torch.rand(tokens, SLOTS, generator=draw).to(dtype)

    @property
    def touched(self) -> list[int]:
        return sorted({one for one in self.indices.flatten().tolist() if one >= 0})

    def loss(self, experts: nn.Module) -> Tensor:
        # Hidden states that need a gradient, as in a model.
        x = self.x if self.x.requires_grad else self.x.detach().requires_grad_()
        out: Tensor = experts(x, self.indices, self.weights)
        return out.square().sum()

    def joined(self, other: "Batch") -> "Batch":
        both = copy.copy(self)
        for name in ("x", "indices", "weights"):
            setattr(both, name, torch.cat([getattr(self, name), getattr(other, name)]))
        return both


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_against_the_formulas(kind: type[TableOptimizer], options: dict[str, Any]) -> None:
    experts = new_experts()
    references = [Reference(table, kind, options) for table in experts.parameters()]
    dense = copy.deepcopy(experts)
    optimizer: Any = kind(experts.parameters(), **options)
    for seed in range(4):
        # Some rows are touched late, some once.
        batch = Batch(3, seed)
        with torch.no_grad():
            for table, reference in zip(dense.parameters(), references, strict=True):
                table.copy_(reference.table)
        dense.zero_grad()
        batch.loss(dense).backward()
        for table, reference in zip(dense.parameters(), references, strict=True):
            assert table.grad is not None
            reference.step(table.grad, batch.touched)
        batch.loss(experts).backward()
        assert all(table.grad is None for table in experts.parameters())
        optimizer.step()
    for table, reference in zip(experts.parameters(), references, strict=True):
        assert_close(table, reference.table, MOMENTS, "table")
        untouched = [row for row, count in enumerate(reference.touches) if count == 0]
        assert len(untouched) >= 10
        assert torch.equal(table[untouched].double(), reference.table[untouched])


def test_a_row_first_touched_late_moves_as_in_a_first_step() -> None:
    """Corrected by the steps of the table, as in SparseAdam, it would move 3 times as far."""
    early, late = new_experts(torch.float32), new_experts(torch.float32)
    batch = Batch(3, 0, torch.float32)
    for experts, steps in ((early, 0), (late, 30)):
        optimizer = RowwiseAdam(experts.parameters(), lr=0.01)
        other = Batch(3, 1, torch.float32)
        other.indices.fill_(25)
        for _ in range(steps):
            other.loss(experts).backward()
            optimizer.step()
        batch.loss(experts).backward()
        optimizer.step()
    for one, other_table in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(one[:20], other_table[:20])


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_split_floats_are_exact(bits: list[int]) -> None:
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    high, low = split(value)
    assert torch.equal(join(high, low).view(torch.int32), value.view(torch.int32))
    finite = value[value.abs() < 3e38]
    error = (split(finite)[0].float() - finite).abs()
    # To nearest: no further than PyTorch's own rounding.
    assert bool((error <= (finite.to(torch.bfloat16).float() - finite).abs()).all())


def give_grads(tables: list[nn.Parameter], seed: int) -> None:
    """Give all tables the same gradients, whatever their dtype."""
    batch = Batch(40, seed, torch.float32)
    pairs = Pairs.from_checked_indices(batch.indices, NUM_EXPERTS)
    for table in tables:
        grad = PairGrad(pairs, batch.weights.flatten(), batch.x)
        collect_pair_grads(table).add(grad)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_16_bits_and_their_missing_half_are_the_float32_table(
    kind: type[TableOptimizer], options: dict[str, Any]
) -> None:
    start = torch.randn(NUM_EXPERTS, HIDDEN_SIZE).to(torch.bfloat16)
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizers: list[Any] = [kind([table], **options) for table in (narrow, wide)]
    for seed in range(5):
        give_grads([narrow, wide], seed)
        for optimizer in optimizers:
            optimizer.step()
    low = optimizers[0].state[narrow]["low_bits"].view(torch.int16)
    assert torch.equal(join(narrow.detach(), low), wide)
    assert not torch.equal(narrow.float(), wide)
    for name, state in optimizers[1].state[wide].items():
        assert torch.equal(optimizers[0].state[narrow][name], state), name


def test_state_takes_as_many_bytes_as_promised() -> None:
    """Weight, missing half and state: 6 bytes and 4, but for some numbers a row."""
    for kind, wanted in ((RowwiseAdam, 6), (RowwiseAdagrad, 4)):
        table = nn.Parameter(torch.zeros(10, 1024, dtype=torch.bfloat16))
        optimizer: Any = kind([table])
        tensors = [table, *optimizer.state[table].values()]
        assert sum(one.nbytes for one in tensors) / table.numel() <= wanted + 0.1


def test_stochastic_rounding_is_right_on_average() -> None:
    values = torch.full((1000, 8), 1 + 2**-10)
    rows = torch.arange(1000)
    rounded = round_stochastically(values, rows, torch.zeros(1000, dtype=torch.int32), seed=3)
    # A bfloat16 above 1 is 1 + 2^-7: an eighth of the elements is rounded up to it.
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    share = (rounded > 1).double().mean().item()
    assert share == pytest.approx(1 / 8, abs=4 * math.sqrt(1 / 8 * 7 / 8 / 8000))
    for other in (
        round_stochastically(values, rows, torch.zeros(1000).int(), seed=4),
        round_stochastically(values, rows, torch.ones(1000).int(), seed=3),
        round_stochastically(values, rows + 1, torch.zeros(1000).int(), seed=3),
    ):
        differing = (other != rounded).double().mean().item()
        assert differing == pytest.approx(2 * 7 / 64, abs=0.03)
    exact = torch.tensor([[1.0, -0.0, torch.inf, -torch.inf]])
    assert torch.equal(round_stochastically(exact, rows[:1], rows[:1], 0).float(), exact)
    assert round_stochastically(exact * torch.nan, rows[:1], rows[:1], 0).isnan().all()


def test_stochastic_rounding_trains_without_more_state(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without kernels: 600 steps.
    monkeypatch.setenv("FLASH_MOE_BACKEND", "reference")
    table = nn.Parameter(torch.zeros(NUM_EXPERTS, HIDDEN_SIZE, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.zeros(NUM_EXPERTS, HIDDEN_SIZE))
    # Steps far below half of the last bit, once weights have grown.
    optimizers = [SGD([table], lr=1e-3, stochastic_rounding=True), SGD([wide], lr=1e-3)]
    assert set(optimizers[0].state[table]) == {"touches"}
    for _ in range(300):
        give_grads([table, wide], 0)
        for optimizer in optimizers:
            optimizer.step()
    # Each of 300 roundings is off by up to 2^-8 of the weight, at random.
    assert_close(table, wide, 2**-8 * math.sqrt(300), "table")


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_and_accumulation_as_on_the_dense_path(max_norm: float) -> None:
    first, second = Batch(5, 0), Batch(0, 1).joined(Batch(7, 2))
    dense, experts = new_experts(), new_experts()
    optimizer = SGD(experts.parameters(), lr=1.0)
    for batch in (first, second):
        (batch.loss(dense) / 2).backward()
        (batch.loss(experts) / 2).backward()
    expected = torch.nn.utils.clip_grad_norm_(dense.parameters(), max_norm)
    assert_close(clip_grad_norm_(experts.parameters(), max_norm), expected, TIGHT, "norm")
    optimizer.step()
    torch.optim.SGD(dense.parameters(), lr=1.0).step()
    for one, other in zip(experts.parameters(), dense.parameters(), strict=True):
        assert_close(one, other, TIGHT, "table")
    # Nothing is left for the next step.
    before = copy.deepcopy(experts.state_dict())
    optimizer.step()
    assert all(torch.equal(one, before[name]) for name, one in experts.state_dict().items())


def test_micro_batches_give_what_one_batch_gives() -> None:
    states = []
    for parts in ([Batch(5, 0).joined(Batch(7, 1))], [Batch(5, 0), Batch(7, 1)]):
        experts = new_experts()
        optimizer = RowwiseAdam(experts.parameters(), lr=0.1)
        for part in parts:
            part.loss(experts).backward()
        optimizer.step()
        states.append(experts.state_dict())
    for name, table in states[0].items():
        assert torch.equal(states[1][name], table), name


def test_a_norm_that_is_not_finite_leaves_everything_as_it_is() -> None:
    experts = new_experts(torch.bfloat16)
    optimizer = RowwiseAdam(experts.parameters(), lr=0.1)
    Batch(5, 0, torch.bfloat16).loss(experts).backward()
    optimizer.step()
    before = copy.deepcopy((experts.state_dict(), optimizer.state_dict()))
    for bad in (math.nan, math.inf):
        (Batch(5, 1, torch.bfloat16).loss(experts) * bad).backward()
        assert not clip_grad_norm_(experts.parameters(), 1.0).isfinite()
        optimizer.step()
        (Batch(5, 1, torch.bfloat16).loss(experts) * bad).backward()
        optimizer.zero_grad()
        optimizer.step()
    after = (experts.state_dict(), optimizer.state_dict())
    assert all(torch.equal(one, before[0][name]) for name, one in after[0].items())
    for number, state in after[1]["state"].items():
        for name, one in state.items():
            assert torch.equal(one, before[1]["state"][number][name]), name


def test_no_dense_gradient_and_no_other_effect() -> None:
    experts, dense = new_experts(), new_experts()
    optimizer = RowwiseAdam(experts.parameters())
    inputs = []
    for one in (experts, dense):
        batch = Batch(6, 0)
        batch.x.requires_grad_()
        batch.weights.requires_grad_()
        batch.loss(one).backward()
        inputs.append((batch.x.grad, batch.weights.grad))
    assert all(table.grad is None for table in experts.parameters())
    assert optimizer.state
    for one, other in zip(*inputs, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_frozen_tables_recomputation_and_one_table_alone() -> None:
    experts, dense = new_experts(), new_experts()
    for one in (experts, dense):
        one.up_weights.requires_grad_(False)
    optimizer = SGD([experts.down_weights], lr=1.0)
    batch = Batch(6, 0)
    batch.loss(dense).backward()
    checkpoint(batch.loss, experts, use_reentrant=False).backward()
    optimizer.step()
    torch.optim.SGD([dense.down_weights], lr=1.0).step()
    assert_close(experts.down_weights, dense.down_weights, TIGHT, "table")
    assert torch.equal(experts.up_weights, dense.up_weights)
    experts.up_weights.requires_grad_(True)
    batch.loss(experts).backward()
    assert experts.up_weights.grad is not None
    assert pair_grads_of(experts.up_weights) is None


def train(experts: nn.Module, steps: int, kind: Any, ranks: int = 1, **options: Any) -> Any:
    optimizer = kind(experts.parameters(), lr=0.05, **options)
    for number in range(steps):
        run_step(experts, optimizer, number, ranks)
    return optimizer


def run_step(experts: nn.Module, optimizer: Any, number: int, ranks: int = 1) -> None:
    if ranks > 1:
        everyone = [batch_of(rank, number) for rank in range(ranks)]
        batch = everyone[0]
        for other in everyone[1:]:
            batch = batch.joined(other)
        (batch.loss(experts) / ranks).backward()
    else:
        batch_of(dist.get_rank(), number).loss(experts).backward()
    clip_grad_norm_(experts.parameters(), 1.0)
    optimizer.step()


def batch_of(rank: int, number: int) -> Batch:
    batch = Batch((7, 0, 1)[(rank + number) % 3], 10 * number + rank)
    for name in ("x", "indices", "weights"):
        setattr(batch, name, getattr(batch, name).to(rank_device()))
    return batch


def sharded_training(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    size = dist.get_world_size()
    alone, experts = (new_experts(dtype, rank_device()) for _ in range(2))
    parallelize_module(experts, rank_runtime().ep_mesh, ExpertParallel())
    one = train(alone, 4, kind, ranks=max(2, size) if size > 1 else 1, **options)
    optimizer = train(experts, 4, kind, **options)
    expected = dict(alone.named_parameters())
    for name, table in experts.named_parameters():
        tolerance = MOMENTS if dtype == torch.float64 else 2**-7
        assert_close(whole(table), whole(expected[name]), tolerance, name)
        for key, state in optimizer.state[table].items():
            assert state.shape == one.state[expected[name]][key].shape
            if dtype == torch.float64:
                assert_close(
                    whole(state).double(), whole(one.state[expected[name]][key]).double(), 1e-4, key
                )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", [RowwiseAdam, RowwiseAdagrad])
def test_training_is_the_same_on_any_ranks(
    kind: Any, world_size: int, rank_pools: RankPools
) -> None:
    options = {"moment_dtype": torch.float32} if kind is RowwiseAdam else {}
    rank_pools.run(world_size, sharded_training, kind, options, torch.float64)


@pytest.mark.gpu
def test_training_is_the_same_with_nccl(rank_pools: RankPools) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    rank_pools.run(2, sharded_training, RowwiseAdam, {}, torch.bfloat16, backend="nccl")
    options = {"max_row_norm": 0.1}
    rank_pools.run(2, sharded_training, RowwiseAdagrad, options, torch.float32, backend="nccl")


def saved_state(folder: str, steps: int) -> None:
    experts, optimizer = new_sharded()
    for number in range(steps):
        run_step(experts, optimizer, number)
    state = {"model": experts.state_dict(), "optim": get_optimizer_state_dict(experts, optimizer)}
    save(state, checkpoint_id=folder)


def new_sharded() -> tuple[FlashExperts, RowwiseAdam]:
    experts = new_experts(torch.bfloat16, rank_device())
    parallelize_module(experts, rank_runtime().ep_mesh, ExpertParallel())
    return experts, RowwiseAdam(experts.parameters(), lr=0.05)


def loaded_state(folder: str) -> dict[str, Tensor]:
    experts, optimizer = new_sharded()
    state = {"model": experts.state_dict(), "optim": get_optimizer_state_dict(experts, optimizer)}
    load(state, checkpoint_id=folder)
    experts.load_state_dict(state["model"])
    set_optimizer_state_dict(experts, optimizer, state["optim"])
    found = {name: whole(table) for name, table in experts.named_parameters()}
    for name, table in experts.named_parameters():
        found |= {f"{name}.{key}": whole(one) for key, one in optimizer.state[table].items()}
    return found


def test_checkpoints_are_the_same_bits_on_other_numbers_of_ranks(
    tmp_path: Any, rank_pools: RankPools
) -> None:
    rank_pools.run(2, saved_state, str(tmp_path), 3)
    expected, *_ = rank_pools.run(2, loaded_state, str(tmp_path))
    assert set(expected) == {
        f"{table}{key}"
        for table in ("down_weights", "up_weights")
        for key in ("", ".exp_avg", ".exp_avg_sq", ".touches", ".low_bits")
    }
    assert expected["down_weights.touches"].sum() > 0
    assert expected["down_weights.low_bits"].count_nonzero() > 0
    for size in (1, 3):
        for found in rank_pools.run(size, loaded_state, str(tmp_path)):
            assert all(torch.equal(one, expected[name]) for name, one in found.items())


def test_state_dicts_schedulers_and_copies() -> None:
    experts = new_experts(torch.bfloat16)
    optimizer = RowwiseAdam(experts.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for seed in range(2):
        Batch(5, seed, torch.bfloat16).loss(experts).backward()
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)
    again = new_experts(torch.bfloat16)
    again.load_state_dict(experts.state_dict())
    other = RowwiseAdam(again.parameters(), lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin, twin_optimizer = copy.deepcopy((experts, optimizer))
    for one, its_optimizer in ((experts, optimizer), (again, other), (twin, twin_optimizer)):
        Batch(5, 7, torch.bfloat16).loss(one).backward()
        its_optimizer.step()
        for table, state in its_optimizer.state.items():
            assert state["exp_avg_sq"].dtype == torch.float32
            assert table.grad is None
    tables = zip(experts.parameters(), again.parameters(), twin.parameters(), strict=True)
    for table, loaded_table, twin_table in tables:
        assert torch.equal(table, loaded_table)
        assert torch.equal(table, twin_table)
    with pytest.raises(ValueError, match=r"state_dict must hold exp_avg, .* low_bits of each"):
        RowwiseAdam(new_experts(torch.bfloat16).parameters()).load_state_dict(
            {**optimizer.state_dict(), "state": {}}
        )


def test_groups_have_options_of_their_own() -> None:
    experts, plain = new_experts(), new_experts()
    optimizer = SGD(
        [{"params": [experts.down_weights], "lr": 0.0}, {"params": [experts.up_weights]}]
    )
    Batch(5, 0).loss(experts).backward()
    optimizer.step()
    assert torch.equal(experts.down_weights, plain.down_weights)
    assert not torch.equal(experts.up_weights, plain.up_weights)


def test_what_is_refused() -> None:
    wrong: Any = "a"
    table = nn.Parameter(torch.zeros(4, 3))
    for build, kind, match in (
        (
            lambda: SGD([nn.Parameter(torch.zeros(4))]),
            ValueError,
            r"got a parameter of shape \(4,\)",
        ),
        (lambda: SGD([nn.Parameter(torch.zeros(4, 3).half())]), TypeError, "got torch.float16"),
        (lambda: SGD([table], lr=-1.0), ValueError, "lr must be at least 0, got -1.0"),
        (lambda: RowwiseAdam([table], betas=(0.9, 1.0)), ValueError, "betas must be two numbers"),
        (lambda: RowwiseAdam([table], eps=wrong), TypeError, "eps must be a number, got 'a'"),
        (lambda: RowwiseAdam([table], moment_dtype=torch.float16), ValueError, "got torch.float16"),
        (
            lambda: SGD([table], stochastic_rounding=wrong),
            TypeError,
            "must be True or False, got 'a'",
        ),
        (lambda: SGD([table], seed=-1), ValueError, "seed must be at least 0, got -1"),
    ):
        with pytest.raises(kind, match=match):
            build()
    optimizer = SGD([table])
    table.grad = torch.ones_like(table)
    with pytest.raises(RuntimeError, match="tables must have no dense gradient with SGD"):
        optimizer.step()
    table.grad = None
    give = collect_pair_grads(table)
    pairs = Pairs.from_checked_indices(torch.tensor([[0]]), len(table))
    grad = PairGrad(pairs, torch.ones(1), torch.ones(1, 3))
    give.add(grad)
    clip_grad_norm_([table], 1.0)
    with pytest.raises(RuntimeError, match="must be added before they are clipped"):
        give.add(grad)


def test_a_compiled_layer_trains_its_tables() -> None:
    plain, compiled = new_experts(), new_experts()
    batch = Batch(6, 0)
    for experts in (plain, compiled):
        optimizer = SGD(experts.parameters(), lr=0.5)
        call: Any = experts if experts is plain else torch.compile(experts, backend="aot_eager")
        batch.loss(call).backward()
        optimizer.step()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradients_are_dense_again_once_the_optimizer_is_gone() -> None:
    experts = new_experts()
    optimizer: Any = RowwiseAdam(experts.parameters())
    optimizer = SGD(experts.parameters(), lr=0.5)
    gc.collect()
    Batch(6, 0).loss(experts).backward()
    assert all(table.grad is None for table in experts.parameters())
    optimizer.step()
    del optimizer
    gc.collect()
    Batch(6, 0).loss(experts).backward()
    assert all(table.grad is not None for table in experts.parameters())


def test_tensors_that_change_after_the_backward_pass() -> None:
    """A buffer used for all micro-batches, and a gradient that autograd adds up in place."""
    results = []
    for kind in (SGD, torch.optim.SGD):
        experts = new_experts()
        position = nn.Parameter(torch.zeros(1, 6, HIDDEN_SIZE, dtype=torch.float64))
        optimizer: Any = kind(experts.parameters(), lr=0.5)
        buffer = torch.empty(6, HIDDEN_SIZE, dtype=torch.float64)
        for seed in range(2):
            batch = Batch(6, seed)
            buffer.copy_(batch.x)
            out = experts(buffer, batch.indices, batch.weights) + position.view_as(buffer)
            out.backward(batch.x)
            batch.x.zero_()
        clip_grad_norm_([*experts.parameters(), position], 1.0)
        optimizer.step()
        results.append(experts)
    for one, other in zip(*(experts.parameters() for experts in results), strict=True):
        assert_close(one, other, TIGHT, "table")


def test_gradients_of_other_tensors_alone() -> None:
    experts = new_experts()
    before = copy.deepcopy(experts.state_dict())
    optimizer = SGD(experts.parameters())
    batch = Batch(6, 0)
    batch.x.requires_grad_()
    torch.autograd.grad(batch.loss(experts), batch.x)
    batch.loss(experts).backward(inputs=[batch.x])
    optimizer.step()
    assert all(torch.equal(one, before[name]) for name, one in experts.state_dict().items())
    with pytest.raises(RuntimeError, match=r"torch.autograd.grad must not be asked for"):
        torch.autograd.grad(batch.loss(experts), list(experts.parameters()))
    batch.loss(experts).backward(inputs=[experts.up_weights])
    optimizer.step()
    assert torch.equal(experts.down_weights, before["down_weights"])
    assert not torch.equal(experts.up_weights, before["up_weights"])


def test_a_model_saved_without_its_optimizer_has_dense_gradients(tmp_path: Path) -> None:
    experts = new_experts()
    optimizer = SGD(experts.parameters())
    torch.save(experts, tmp_path / "model")
    loaded = torch.load(tmp_path / "model", weights_only=False)
    Batch(6, 0).loss(loaded).backward()
    assert all(table.grad is not None for table in loaded.parameters())
    assert optimizer.state


def test_clipping_before_the_first_pass() -> None:
    experts = new_experts()
    optimizer = SGD(experts.parameters())
    assert clip_grad_norm_(experts.parameters(), 1.0) == 0
    Batch(6, 0).loss(experts).backward()
    optimizer.step()


def test_state_of_another_shape_is_refused_before_anything_is_loaded() -> None:
    adam, lazy = (
        kind(new_experts().parameters(), lr=lr)
        for kind, lr in ((RowwiseAdam, 0.5), (LazyAdam, 0.1))
    )
    with pytest.raises(ValueError, match=r"exp_avg_sq of shape \(30, 12\), got \(30,\)"):
        lazy.load_state_dict(adam.state_dict())
    assert lazy.param_groups[0]["lr"] == 0.1


def test_tables_converted_after_their_optimizer_was_made_are_refused() -> None:
    for before, after in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        experts = new_experts(before)
        optimizer = RowwiseAdam(experts.parameters())
        experts.to(after)
        with pytest.raises(RuntimeError, match="tables must have the dtype that they had"):
            optimizer.step()


def test_no_table_changes_if_one_cannot() -> None:
    tables = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = SGD(tables, lr=1.0)
    pairs = Pairs.from_checked_indices(torch.tensor([[0]]), 4)
    collect_pair_grads(tables[0]).add(PairGrad(pairs, torch.ones(1), torch.ones(1, 3)))
    tables[1].grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="must have no dense gradient"):
        optimizer.step()
    assert torch.equal(tables[0], torch.ones(4, 3))


def test_state_from_before_rows_were_clipped() -> None:
    experts = new_experts()
    optimizer = SGD(experts.parameters(), max_row_norm=1.0)
    state = optimizer.state_dict()
    del state["param_groups"][0]["max_row_norm"]
    optimizer.load_state_dict(state)
    Batch(6, 0).loss(experts).backward()
    optimizer.step()


def test_optimizers_that_cannot_be_joined() -> None:
    table, other = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    sgd, tables = torch.optim.SGD([other], lr=0.1), RowwiseAdam([table])
    assert JoinedOptimizers([sgd, tables]).kind == "SGD, RowwiseAdam"
    wrong: list[Any] = [[], [sgd, tables, sgd], [sgd, 3], nn.Linear(2, 2)]
    for several, error, match in zip(
        wrong,
        (ValueError, ValueError, TypeError, TypeError),
        ("or several, got none", "different parameters, got two with the same", "", ""),
        strict=True,
    ):
        with pytest.raises(error, match=f"^optimizer must be .*{match}"):
            JoinedOptimizers(several)


def test_a_checkpoint_with_other_state_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    table, other = nn.Parameter(torch.ones(4, 3).bfloat16()), nn.Parameter(torch.ones(3))
    model = nn.ParameterList([table, other])
    adam = torch.optim.Adam([other], lr=0.1)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(0, model, [adam, SGD([table])])
    with torch.no_grad():
        other.zero_()
    adam.param_groups[0]["lr"] = 0.2
    rounding = SGD([table], stochastic_rounding=True)
    with pytest.raises(ValueError, match="tables have low_bits, here touches"):
        checkpoints.load(0, model, [adam, rounding])
    assert (other.sum().item(), adam.param_groups[0]["lr"]) == (0, 0.2)


def test_moments_keep_their_own_dtype(tmp_path: Path) -> None:
    table = nn.Parameter(torch.ones(4, 3))
    model = nn.ParameterList([table])
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(0, model, RowwiseAdam([table], moment_dtype=torch.float32))
    optimizer = RowwiseAdam([table])
    checkpoints.load(0, model, optimizer)
    assert optimizer.state[table]["exp_avg"].dtype == torch.bfloat16


def sharded_evaluation() -> None:
    experts, _ = new_sharded()
    batch = batch_of(0, 0)
    batch.x = batch.x.to(torch.bfloat16)
    with torch.inference_mode():
        found = experts(batch.x, batch.indices, batch.weights)
    with torch.no_grad():
        assert torch.equal(found, experts(batch.x, batch.indices, batch.weights))


def test_evaluation_of_a_sharded_layer_whose_tables_have_an_optimizer(
    rank_pools: RankPools,
) -> None:
    for ranks in (1, 2):
        rank_pools.run(ranks, sharded_evaluation)

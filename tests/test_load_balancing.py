"""What keeps the load of experts even: formulas against brute force, and the same on any ranks."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_close
from ranks import RankPools, rank_device, rank_runtime
from sharded import whole_parameters
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashMoE, ProductKeyRouter, router_loss
from flash_moe_dist import ExpertParallel, count_load, sync_routers

HIDDEN_SIZE, NUM_EXPERTS, SLOTS, GRID = 12, 30, 4, (5, 6)
ALL_ON: dict[str, Any] = {"aux_loss_coef": 0.5, "z_loss_coef": 0.25, "bias_update_rate": 0.125}
TIGHT = 1e-11


def new_router(bias_update_rate: float = 0, **options: Any) -> ProductKeyRouter:
    torch.manual_seed(1)
    sizes = HIDDEN_SIZE, NUM_EXPERTS, SLOTS
    return ProductKeyRouter(*sizes, bias_update_rate=bias_update_rate, **options).double()


def new_layer(bias_update_rate: float = 0, **options: Any) -> FlashMoE:
    torch.manual_seed(1)
    sizes = HIDDEN_SIZE, 8, NUM_EXPERTS, SLOTS
    layer = FlashMoE(*sizes, bias_update_rate=bias_update_rate, **options)
    return layer.double().to(rank_device())


def tokens(number: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(number, HIDDEN_SIZE, generator=draw, dtype=torch.float64)
    # A mean and a spread that a normalization has to remove.
    return (3 * drawn + torch.arange(HIDDEN_SIZE)).to(rank_device())


def step(model: nn.Module, loss: Tensor, lr: float = 0.01) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def all_scores(router: ProductKeyRouter, x_TH: Tensor) -> Tensor:
    """Scores (T, A, B) of all experts, normalized by torch's own batch norm if the router does."""
    scores = router.keys(x_TH)
    if router.score_norm is not None:
        scores = nn.functional.batch_norm(scores, None, None, training=True)
    first, second = scores.split(GRID, dim=-1)
    return first.unsqueeze(-1) + second.unsqueeze(-2)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_normalized_scores_choose_the_experts(norm_topk_prob: bool) -> None:
    router, x_TH = new_router(norm_topk_prob=norm_topk_prob), tokens(40).requires_grad_()
    indices, weights = router(x_TH)
    probabilities = all_scores(router, x_TH).flatten(1).softmax(-1)
    expected, best = probabilities.topk(SLOTS)
    if norm_topk_prob:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(indices, best)
    assert_close(weights, expected, TIGHT, "weights")
    draws, wanted = tokens(40, seed=1)[:, :SLOTS], (x_TH, router.keys.weight)
    grads = torch.autograd.grad(weights, wanted, draws)
    for grad, other in zip(grads, torch.autograd.grad(expected, wanted, draws), strict=True):
        assert_close(grad, other, TIGHT, "gradient")


def test_running_statistics_are_those_of_batch_norm() -> None:
    router, norm = new_router(), nn.BatchNorm1d(sum(GRID), affine=False).double()
    for seed in range(3):
        x_TH = tokens(40, seed)
        norm(router.keys(x_TH).detach())
        step(router, router(x_TH)[1].square().sum())
    assert router.score_norm is not None
    assert_close(router.score_norm.running_mean, norm.get_buffer("running_mean"), TIGHT, "mean")
    assert_close(router.score_norm.running_var, norm.get_buffer("running_var"), TIGHT, "variance")
    router.eval()
    norm.eval()
    x_TH = tokens(7, seed=9)
    first, second = norm(router.keys(x_TH)).split(GRID, dim=-1)
    sums = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(1)
    expected, best = sums.topk(SLOTS)
    indices, weights = router(x_TH)
    assert torch.equal(indices, best)
    assert_close(weights, expected.softmax(-1), TIGHT, "weights")
    assert_close(router(x_TH[:1])[1], weights[:1], TIGHT, "weights of one token")


@pytest.mark.parametrize("score_norm", ["batch", None])
@pytest.mark.parametrize(("aux", "z"), [(0.5, 0.0), (0.0, 0.25), (0.5, 0.25)])
def test_losses_against_the_probabilities_of_all_experts(
    score_norm: Any, aux: float, z: float
) -> None:
    router = new_router(score_norm=score_norm, aux_loss_coef=aux, z_loss_coef=z)
    x_TH = tokens(40).requires_grad_()
    indices, _ = router(x_TH)
    loss = router_loss(router)

    probabilities = all_scores(router, x_TH).flatten(1).softmax(-1).view(-1, *GRID).mean(0)
    shares = torch.bincount(indices.flatten(), minlength=NUM_EXPERTS).double() / indices.numel()
    shares = shares.view(GRID)
    expected = torch.zeros((), dtype=torch.float64)
    for axis, other in ((0, 1), (1, 0)):
        expected = expected + aux * GRID[axis] * probabilities.sum(other) @ shares.sum(other)
        scores = all_scores(router, x_TH)
        # Scores of one axis, from a difference that takes out the other's.
        axis_scores = scores.select(other + 1, 0) - _first_of(router, x_TH, other).unsqueeze(-1)
        expected = expected + z * axis_scores.logsumexp(-1).square().mean()
    assert_close(loss, expected, TIGHT, "loss")
    wanted = (x_TH, router.keys.weight)
    for grad, other_grad in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        assert_close(grad, other_grad, TIGHT, "gradient")


def _first_of(router: ProductKeyRouter, x_TH: Tensor, axis: int) -> Tensor:
    """Scores (T,) of the first key of an axis."""
    scores = router.keys(x_TH)
    if router.score_norm is not None:
        scores = nn.functional.batch_norm(scores, None, None, training=True)
    return scores.split(GRID, dim=-1)[axis][:, 0]


def test_even_load_has_the_least_loss() -> None:
    router = new_router(aux_loss_coef=1.0, score_norm=None)
    nn.init.zeros_(router.keys.weight)
    router(tokens(5))
    assert router_loss(router).item() == pytest.approx(2)


@pytest.mark.parametrize("score_norm", ["batch", None])
def test_key_biases_against_loads_of_all_experts(score_norm: Any) -> None:
    router = new_router(score_norm=score_norm, bias_update_rate=0.125)
    assert router.key_bias is not None
    expected = torch.zeros(sum(GRID), dtype=torch.float64)
    for seed in range(4):
        x_TH = tokens(40, seed)
        indices, weights = router(x_TH)
        scores = all_scores(router, x_TH)
        first, second = expected.split(GRID)
        best = (scores + first.unsqueeze(-1) + second).flatten(1).topk(SLOTS).indices
        assert torch.equal(indices, best)
        chosen = scores.flatten(1).gather(1, best).softmax(-1)
        assert_close(weights, chosen, TIGHT, "weights have no bias")
        load = torch.bincount(indices.flatten(), minlength=NUM_EXPERTS).view(GRID).double()
        loads = [load.sum(1), load.sum(0)]
        expected = expected + 0.125 * torch.cat([(one.mean() - one).sign() for one in loads])
        step(router, weights.square().sum())
        assert torch.equal(router.key_bias.bias.double(), expected)
    assert expected.abs().max() > 0.125
    router.eval()
    router(tokens(40))
    step(router, router(tokens(40))[1].square().sum())
    assert torch.equal(router.key_bias.bias.double(), expected)


def test_normalization_and_key_biases_are_the_defaults() -> None:
    layer = FlashMoE(HIDDEN_SIZE, 8, NUM_EXPERTS, SLOTS)
    layer(tokens(5).float())
    assert router_loss(layer).item() == 0
    assert layer.router.key_bias is not None
    assert layer.router.key_bias.rate == 0.001
    assert set(layer.router.state_dict()) == {
        *("grid", "keys.weight", "key_bias.bias"),
        *("score_norm.running_mean", "score_norm.running_var"),
    }
    plain = ProductKeyRouter(8, NUM_EXPERTS, SLOTS, score_norm=None, bias_update_rate=0)
    assert set(plain.state_dict()) == {"grid", "keys.weight"}


UNEVEN = (7, 0, 1)


def train_alone(num_ranks: int, options: dict[str, Any]) -> FlashMoE:
    """Three steps of two micro-batches, each of the tokens of all ranks."""
    layer = new_layer(**options)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for number in range(6):
        everyone = torch.cat([tokens_of(rank, number) for rank in range(num_ranks)])
        loss = layer(everyone).square().sum() / num_ranks + router_loss(layer)
        assert router_loss(layer).item() == 0
        (loss / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return layer


def tokens_of(rank: int, number: int) -> Tensor:
    return tokens(UNEVEN[(rank + number) % 3] + (3 if rank == 0 else 0), seed=10 * number + rank)


def train_on_ranks(options: dict[str, Any], is_sharded: bool) -> None:
    alone = train_alone(dist.get_world_size(), options)
    layer = new_layer(**options)
    mesh = rank_runtime().ep_mesh
    if is_sharded:
        parallelize_module(layer, mesh, {"experts": ExpertParallel()})
    else:
        sync_routers(layer, mesh)
    # On a GPU, SGD would update plain and sharded parameters in one list, which PyTorch refuses.
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, foreach=False)
    for number in range(6):
        loss = layer(tokens_of(dist.get_rank(), number)).square().sum() + router_loss(layer)
        (loss / 2).backward()
        if number % 2:
            for parameter in layer.parameters():
                if not isinstance(parameter, DTensor):
                    assert parameter.grad is not None
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
            optimizer.step()
            optimizer.zero_grad()
    expected = whole_parameters(alone)
    for name, value in whole_parameters(layer).items():
        assert_close(value, expected[name], TIGHT, name)
    for name, buffer in alone.named_buffers():
        if buffer.numel() > 0:
            assert_close(layer.get_buffer(name), buffer, TIGHT, name)


EACH_OPTION = [
    pytest.param({"score_norm": "batch"}, id="score_norm"),
    pytest.param({"score_norm": None, "aux_loss_coef": 0.5}, id="aux_loss"),
    pytest.param({"score_norm": None, "z_loss_coef": 0.25}, id="z_loss"),
    pytest.param({"score_norm": None, "bias_update_rate": 0.125}, id="bias"),
    pytest.param(ALL_ON, id="all"),
]


@pytest.mark.parametrize("options", EACH_OPTION)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_is_the_same_on_any_ranks(
    world_size: int, options: dict[str, Any], rank_pools: RankPools
) -> None:
    rank_pools.run(world_size, train_on_ranks, options, True)


def test_training_with_replicated_experts(rank_pools: RankPools) -> None:
    rank_pools.run(3, train_on_ranks, ALL_ON, False)


@pytest.mark.gpu
def test_training_is_the_same_with_nccl(rank_pools: RankPools) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    rank_pools.run(2, train_on_ranks, ALL_ON, True, backend="nccl")


def wrong_input_on_one_rank(is_wrong_shape: bool) -> list[str]:
    layer = new_layer(**ALL_ON)
    parallelize_module(layer, rank_runtime().ep_mesh, {"experts": ExpertParallel()})
    messages = []
    for wrong_rank in range(dist.get_world_size()):
        wrong = tokens(3)[:, :5] if is_wrong_shape else tokens(3).float()
        try:
            layer(wrong if dist.get_rank() == wrong_rank else tokens(4))
        except (TypeError, ValueError) as error:
            messages.append(str(error))
        router_loss(layer)
        layer(tokens(2)).sum().backward()
    try:
        if dist.get_rank() == 1:
            layer.fail(ValueError("this rank has no batch"))
        layer(tokens(4))
    except ValueError as error:
        messages.append(str(error))
    return messages


@pytest.mark.parametrize("is_wrong_shape", [True, False])
def test_wrong_input_on_one_rank_raises_on_all(is_wrong_shape: bool, rank_pools: RankPools) -> None:
    messages = rank_pools.run(3, wrong_input_on_one_rank, is_wrong_shape)
    expected = "rows of hidden_size = 12" if is_wrong_shape else "must have the dtype"
    for *each, last in messages:
        assert [f"rank {rank}: hidden_states" in one for rank, one in enumerate(each)] == [True] * 3
        assert all(expected in one for one in each)
        assert last == "rank 1: this rank has no batch"


def failed_pass_then_a_step(options: dict[str, Any]) -> None:
    """A pass that fails on one rank, and so on all, leaves nothing behind."""
    layers = []
    for fails in (False, True):
        layer = new_layer(**options)
        parallelize_module(layer, rank_runtime().ep_mesh, {"experts": ExpertParallel()})
        for wrong_rank in range(dist.get_world_size() if fails else 0):
            x_TH = tokens(3)[:, :5] if dist.get_rank() == wrong_rank else tokens(4)
            with pytest.raises(ValueError, match="rows of hidden_size"):
                layer(x_TH)
        assert router_loss(layer).item() == 0
        loss = layer(tokens(5, seed=dist.get_rank())).square().sum() + router_loss(layer)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, foreach=False)
        loss.backward()
        optimizer.step()
        layers.append(layer)
    for (name, one), (_, other) in zip(
        layers[0].named_buffers(), layers[1].named_buffers(), strict=True
    ):
        assert torch.equal(one, other), name
    expected = whole_parameters(layers[0])
    for name, value in whole_parameters(layers[1]).items():
        assert torch.equal(value, expected[name]), name


def test_a_pass_that_fails_leaves_nothing_behind(rank_pools: RankPools) -> None:
    rank_pools.run(2, failed_pass_then_a_step, ALL_ON)


def in_another_mode() -> str:
    # Of its own, as its collectives never end.
    mesh = DeviceMesh.from_group(dist.new_group(), "cpu", mesh_dim_names=("ep",))
    layer = new_layer()
    parallelize_module(layer, mesh, {"experts": ExpertParallel()})
    layer.train(dist.get_rank() == 0)
    with pytest.raises(ValueError, match="ranks must agree on the pass") as caught:
        layer(tokens(4))
    return str(caught.value)


@pytest.mark.slow
def test_ranks_in_different_modes_say_so() -> None:
    pools = RankPools()
    try:
        first, second = pools.run(2, in_another_mode)
    finally:
        pools.close()
    assert first == second
    assert "rank 0: statistics of a router, rank 1: call 0 of layer" in first


def accumulate_under_ddp() -> None:
    """Without no_sync, DDP broadcasts the buffers of the first rank before each micro-batch."""
    num_ranks, options = dist.get_world_size(), {"bias_update_rate": 0.125}
    alone, layer = new_layer(**options), new_layer(**options)
    sync_routers(layer, rank_runtime().ep_mesh)
    wrapped = nn.parallel.DistributedDataParallel(layer)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05) for one in (alone, layer)]
    for number in range(6):
        everyone = torch.cat([tokens_of(rank, number) for rank in range(num_ranks)])
        (alone(everyone).square().sum() / num_ranks).backward()
        wrapped(tokens_of(dist.get_rank(), number)).square().sum().backward()
        if number % 3 == 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for name, buffer in alone.named_buffers():
        if buffer.numel() > 0:
            assert_close(layer.get_buffer(name), buffer, TIGHT, name)
    assert alone.router.key_bias is not None
    assert alone.router.key_bias.bias.abs().max() > 0


def test_micro_batches_under_ddp(rank_pools: RankPools) -> None:
    rank_pools.run(2, accumulate_under_ddp)


def test_steps_of_other_models_change_nothing() -> None:
    layer, other = new_layer(**ALL_ON), nn.Linear(3, 3)
    with pytest.raises(ValueError, match="num_experts_per_tok") as kept:
        ProductKeyRouter(8, 30, 31)
    loss = layer(tokens(40)).square().sum()
    before = copy.deepcopy(layer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(other, other(torch.ones(3)).sum())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert router_loss(layer).item() > 0
    step(layer, loss)
    assert layer.router.key_bias is not None
    assert layer.router.key_bias.bias.abs().max() > 0
    assert "got 31" in str(kept.value)


def scores_of_16_bits(keys: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """The scores that autocast computes, in float32."""
    return nn.functional.linear(inputs[0].bfloat16(), keys.weight.bfloat16()).float()


def test_losses_in_16_bits_are_those_in_float32() -> None:
    grads = []
    for is_narrow in (False, True):
        router = new_router(aux_loss_coef=0.5, z_loss_coef=0.25).float()
        x_TH = tokens(400).float().requires_grad_()
        if is_narrow:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                indices, _ = router(x_TH)
        else:
            router.keys.register_forward_hook(scores_of_16_bits)
            indices, _ = router(x_TH)
        loss = router_loss(router)
        assert loss.dtype == torch.float32
        grads.append((loss, torch.autograd.grad(loss, router.keys.weight)[0], indices))
    (loss, grad, indices), (other_loss, other_grad, other_indices) = grads
    assert torch.equal(indices, other_indices)
    assert_close(other_loss, loss, 1e-5, "loss")
    # The product with the keys rounds its gradient to bfloat16.
    assert_close(other_grad, grad, 2**-7, "gradient")


@pytest.mark.parametrize("is_inside", [False, True])
def test_recomputation_and_compilation_count_once(is_inside: bool) -> None:
    layer, x_TH = new_layer(bias_update_rate=0.125), tokens(40).requires_grad_()
    plain = new_layer(bias_update_rate=0.125)
    step(plain, plain(x_TH).square().sum())
    if is_inside:
        inner = torch.compile(layer, backend="aot_eager")
        out: Any = checkpoint(inner, x_TH, use_reentrant=False)
    else:
        outer = torch.compile(
            lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager"
        )
        out = outer(x_TH)
    step(layer, out.square().sum())
    for name, value in plain.state_dict().items():
        if value.numel() > 0:
            assert_close(layer.state_dict()[name], value, TIGHT, name)


def test_losses_of_a_graph_compiled_within_a_checkpoint_are_refused() -> None:
    layer = new_layer(aux_loss_coef=0.5)
    inner = torch.compile(layer, backend="aot_eager")
    out: Any = checkpoint(inner, tokens(8).requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="compile around it"):
        (out.square().sum() + router_loss(layer)).backward()


@pytest.mark.gpu
def test_the_host_does_not_wait(device: torch.device) -> None:
    layer = new_layer(**ALL_ON).float().to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x_TH = tokens(40).float().to(device)
    for mode in ("default", "error"):
        # Kernels are compiled in the first round.
        torch.cuda.set_sync_debug_mode(mode)
        try:
            (layer(x_TH).square().sum() + router_loss(layer)).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_in_a_cuda_graph(device: torch.device) -> None:
    """Forward and backward captured and replayed, with eager steps between."""
    states = []
    for is_captured in (False, True):
        layer = new_layer(bias_update_rate=0.125).float().to(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        x_TH = torch.zeros(40, HIDDEN_SIZE, device=device)

        def forward_and_backward(layer: FlashMoE = layer, x_TH: Tensor = x_TH) -> None:
            layer(x_TH).square().sum().backward()

        graph = torch.cuda.CUDAGraph()
        if is_captured:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                forward_and_backward()
            torch.cuda.current_stream().wait_stream(side)
            optimizer.zero_grad()
            layer.router.forget_batch()
            with torch.cuda.graph(graph):
                forward_and_backward()
        for seed in range(4):
            x_TH.copy_(tokens(40, seed).float())
            if is_captured:
                graph.replay()
            else:
                optimizer.zero_grad()
                forward_and_backward()
            optimizer.step()
        states.append(layer.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def state_after(run: Callable[[FlashMoE], Tensor]) -> dict[str, Tensor]:
    layer = new_layer(**ALL_ON)
    step(layer, run(layer))
    return layer.state_dict()


def test_recomputation_counts_once() -> None:
    x_TH = tokens(40).requires_grad_()

    def plain(layer: FlashMoE) -> Tensor:
        return layer(x_TH).square().sum() + router_loss(layer)

    def recomputed(layer: FlashMoE) -> Tensor:
        out: Any = checkpoint(layer, x_TH, use_reentrant=False)
        return out.square().sum() + router_loss(layer)

    expected = state_after(plain)
    for name, value in state_after(recomputed).items():
        assert torch.equal(value, expected[name]), name


def test_reentrant_recomputation_counts_once_and_refuses_losses() -> None:
    x_TH = tokens(40).requires_grad_()
    states = []
    for is_recomputed in (False, True):
        layer = new_layer(bias_update_rate=0.125)
        out = checkpoint(layer, x_TH, use_reentrant=True) if is_recomputed else layer(x_TH)
        step(layer, out.square().sum())
        states.append(layer.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    layer = new_layer(aux_loss_coef=0.5)
    step(layer, layer(x_TH).square().sum() + router_loss(layer))
    out = checkpoint(layer, x_TH, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        out.square().sum().backward()


def test_accumulated_micro_batches_count_as_one_batch() -> None:
    whole_batch, parts = new_layer(bias_update_rate=0.125), new_layer(bias_update_rate=0.125)
    for _ in range(2):
        x_TH = tokens(40)
        optimizer = torch.optim.SGD(parts.parameters(), lr=0.0)
        for part in x_TH.split([13, 0, 26, 1]):
            parts(part).sum().backward()
        optimizer.step()
        step(whole_batch, whole_batch(x_TH).sum(), lr=0.0)
    expected = dict(whole_batch.named_buffers())
    norm = parts.router.score_norm
    assert norm is not None
    assert_close(norm.running_mean, expected["router.score_norm.running_mean"], TIGHT, "mean")
    assert_close(norm.running_var, expected["router.score_norm.running_var"], TIGHT, "variance")
    assert parts.router.key_bias is not None
    assert parts.router.key_bias.bias.abs().max() > 0


@pytest.mark.parametrize("number", [0, 1])
def test_no_token_and_one_token(number: int) -> None:
    layer = new_layer(**ALL_ON)
    before = copy.deepcopy(layer.router.score_norm)
    x_TH = tokens(number).requires_grad_()
    loss = layer(x_TH).square().sum() + router_loss(layer)
    step(layer, loss)
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        assert value.isfinite().all(), name
    assert x_TH.grad is not None
    assert x_TH.grad.isfinite().all()
    # One token has no variance.
    assert layer.router.score_norm is not None
    assert before is not None
    assert torch.equal(layer.router.score_norm.running_var, before.running_var)


def test_statistics_stay_in_float32() -> None:
    layer = FlashMoE(HIDDEN_SIZE, 8, NUM_EXPERTS, SLOTS, **ALL_ON).to(torch.bfloat16)
    layer.router.reset_parameters()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(tokens(40).float())
        loss = out.float().square().sum() + router_loss(layer)
    step(layer, loss)
    for name, buffer in layer.named_buffers():
        assert name == "router.grid" or buffer.dtype in (torch.float32, torch.float64, torch.int64)
    assert layer.router.score_norm is not None
    scores = layer.router.keys
    assert scores.weight.dtype == torch.bfloat16
    assert layer.router.score_norm.running_mean.abs().max() > 0


def test_losses_that_are_not_taken() -> None:
    layer = new_layer(aux_loss_coef=0.5)
    with pytest.warns(UserWarning, match="loss = loss \\+ flash_moe.router_loss"):
        step(layer, layer(tokens(4)).sum())
    layer.eval()
    layer(tokens(4))
    assert router_loss(layer).item() == 0
    layer.train()
    with torch.no_grad():
        layer(tokens(4))
    assert router_loss(layer).item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer, layer(tokens(4)).sum() + layer(tokens(4)).sum() + router_loss(layer))
    with pytest.raises(TypeError, match="model must be of type Module"):
        router_loss(layer.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_update_themselves(copied: Callable[[FlashMoE], FlashMoE]) -> None:
    layer = new_layer(**ALL_ON)
    layer(tokens(4))
    twin = copied(layer)
    router_loss(layer)
    for one in (layer, twin):
        if one is twin:
            one(tokens(4))
        step(one, one(tokens(40)).sum() + router_loss(one))
        assert one.router.score_norm is not None
        assert one.router.score_norm.running_mean.abs().max() > 0


def test_evaluation_takes_the_statistics_of_passes_without_a_step() -> None:
    router = new_router()
    with torch.no_grad():
        router(tokens(40))
    router.eval()
    assert router.score_norm is not None
    scores = router.keys(tokens(40))
    assert_close(router.score_norm.running_mean, 0.1 * scores.mean(0), TIGHT, "mean")


def test_forced_balance_spreads_tokens_evenly_and_keeps_gradients() -> None:
    torch.manual_seed(0)
    layer = FlashMoE(HIDDEN_SIZE, 8, 36, 8, force_load_balance=True)
    # All tokens alike, which any router would send to the same experts.
    x_TH = torch.ones(150, HIDDEN_SIZE)
    with count_load(layer) as loads:
        out = layer(x_TH)
    (load,) = loads.values()
    assert load.usage == 1
    assert load.unevenness < 0.1
    out.square().sum().backward()
    assert layer.router.keys.weight.grad is not None
    assert layer.router.keys.weight.grad.isfinite().all()
    indices, _ = layer.router(x_TH)
    assert all(len(set(row.tolist())) == 8 for row in indices[:100])


def test_compiled_without_a_break() -> None:
    states = []
    for is_compiled in (False, True):
        router = new_router(**ALL_ON)
        forward = (
            torch.compile(router, backend="aot_eager", fullgraph=True) if is_compiled else router
        )
        for seed in range(2):
            _, weights = forward(tokens(40, seed))
            step(router, weights.square().sum() + router_loss(router))
        states.append(router.state_dict())
    for name, value in states[0].items():
        if value.numel() > 0:
            assert_close(states[1][name], value, TIGHT, name)


def test_bad_options() -> None:
    for options, error, match in (
        ({"score_norm": "layer"}, ValueError, "score_norm must be 'batch' or None, got 'layer'"),
        ({"aux_loss_coef": -1.0}, ValueError, "aux_loss_coef must be at least 0, got -1.0"),
        ({"z_loss_coef": "1"}, TypeError, "z_loss_coef must be a number, got '1'"),
        (
            {"bias_update_rate": math.nan},
            ValueError,
            "bias_update_rate must .* 0, got nan",
        ),
        ({"force_load_balance": 1}, TypeError, "force_load_balance must be True or False, got 1"),
    ):
        for build in (new_router, new_layer):
            with pytest.raises(error, match=match):
                build(**options)
    with pytest.raises(TypeError, match="mesh must be of type DeviceMesh"):
        sync_routers(new_layer(), None)  # type: ignore[arg-type]

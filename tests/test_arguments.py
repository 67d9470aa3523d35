"""Public functions name an argument of a wrong type or value, before they do anything."""

import math
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPools
from torch import nn

from flash_moe import FlashExperts, FlashMoE, ProductKeyRouter
from flash_moe.layers.moe import SharedMLP
from flash_moe_dist import (
    Checkpointer,
    ExpertParallel,
    Runtime,
    clip_grad_norm_,
    count_load,
    distributed,
    init_normal_rows_,
    materialize,
    parameter_groups,
    time_phases,
)
from flash_moe_dist.export import export_tensors, import_tensors

# Without types, as mypy would refuse what is wrong here.
wrong: Any = partial
linear: Any = nn.Linear(3, 2)
names = {"weight": linear.weight}


def with_gradient(grad: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    parameter.grad = grad
    return parameter


def entered(manager: Any, *args: Any) -> None:
    block: AbstractContextManager[object] = manager(*args)
    with block:
        pass


sparse, complex_grad = torch.eye(2).to_sparse(), torch.eye(2, dtype=torch.complex64)
shared_mlp: Any = SharedMLP(8, 6)
circular: list[Any] = []
circular.append(circular)
deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (wrong(FlashMoE, 8.0, 6, 9, 2), TypeError, "hidden_size must be an int, got 8.0"),
        (wrong(FlashMoE, 8, 6.0, 9, 2), TypeError, "intermediate_size must be an int, got 6.0"),
        (wrong(FlashMoE, 8, 6, 9.0, 2), TypeError, "num_experts must be an int, got 9.0"),
        (wrong(FlashMoE, 8, 6, 9, 2.0), TypeError, "num_experts_per_tok must be an int, got 2.0"),
        (wrong(FlashMoE, 8, 6, 9, True), TypeError, "num_experts_per_tok .* an int, got True"),
        (wrong(FlashMoE, 8, 6, 9, None), TypeError, "num_experts_per_tok .* an int, got None"),
        (wrong(FlashMoE, 8, -6, 9, 2), ValueError, "intermediate_size .* at least 0, got -6"),
        # A device in place of norm_topk_prob.
        (wrong(FlashMoE, 8, 6, 9, 2, "cpu"), TypeError, "norm_topk_prob must be .* got 'cpu'"),
        (wrong(ProductKeyRouter, 8, "9", 2), TypeError, "num_experts must be an int, got '9'"),
        (wrong(ProductKeyRouter, -8, 9, 2), ValueError, "hidden_size must be at least 0, got -8"),
        (wrong(ProductKeyRouter, 8, 0, 0), ValueError, "num_experts must be at least 1, got 0"),
        (wrong(ProductKeyRouter, 8, 9, 2, key_grid=3), TypeError, "key_grid must be .* got 3"),
        (
            wrong(ProductKeyRouter, 8, 9, 2, key_grid=(3.0, 3)),
            TypeError,
            "key_grid must be .*3.0",
        ),
        (
            wrong(ProductKeyRouter, 8, 529, 2, key_grid=(-1000, 5)),
            ValueError,
            r"key_grid must be two numbers with a product of num_experts = 529, got \(-1000, 5\)",
        ),
        (
            wrong(ProductKeyRouter, 8, 9, 2, key_grid=(-3, -3)),
            ValueError,
            r"key_grid must be two numbers .* got \(-3, -3\)",
        ),
        (wrong(FlashMoE, 8, 6, 9, 2, device="gpu"), ValueError, "device must .* got 'gpu'"),
        (wrong(ProductKeyRouter, 8, 9, 2, device="gpu"), ValueError, "device must .* got 'gpu'"),
        (wrong(FlashExperts, 9, 8, "cuda:x"), ValueError, "device must .* got 'cuda:x'"),
        (wrong(FlashExperts, 9, 8, 1.0), TypeError, "device must be of type .* got float"),
        (wrong(SharedMLP, 8, 6, "gpu"), ValueError, "device must .* got 'gpu'"),
        (wrong(SharedMLP, 8, 6, dtype=torch.int32), TypeError, "dtype must be .*torch.int32"),
        (wrong(SharedMLP, 8, 6, dtype="float32"), TypeError, "dtype must be .* 'float32'"),
        (wrong(shared_mlp, [[0.0] * 8]), TypeError, "hidden_states must be .* got list"),
        (wrong(shared_mlp, torch.eye(8).to_sparse()), TypeError, "hidden_states .*sparse_coo"),
        (wrong(shared_mlp, torch.eye(7)), ValueError, r"hidden_states .* got shape \(7, 7\)"),
        (wrong(shared_mlp, torch.tensor(1.0)), ValueError, r"hidden_states .* got shape \(\)"),
        (wrong(FlashExperts, 9.0, 8), TypeError, "num_experts must be an int, got 9.0"),
        (wrong(FlashExperts, 9, -8), ValueError, "hidden_size must be at least 0, got -8"),
        (wrong(FlashExperts, 9, 8, dtype=torch.int32), TypeError, "dtype must be .*torch.int32"),
        (wrong(FlashMoE, 8, 6, 9, 2, dtype="float32"), TypeError, "dtype must be .* 'float32'"),
        (wrong(FlashExperts, 9, 8, up_std="1"), TypeError, "up_std must be a number, got '1'"),
        (wrong(FlashExperts, 9, 8, up_std=-1.0), ValueError, "up_std .* at least 0, got -1.0"),
        (wrong(FlashExperts, 9, 8, up_std=math.nan), ValueError, "up_std .* at least 0, got nan"),
        (
            wrong(clip_grad_norm_, [with_gradient(sparse)], 1.0),
            TypeError,
            "gradients .* got .*sparse_coo",
        ),
        (
            wrong(clip_grad_norm_, [with_gradient(complex_grad)], 1.0),
            TypeError,
            "gradients .* got .*complex",
        ),
        (
            wrong(clip_grad_norm_, linear.named_parameters(), 1.0),
            TypeError,
            "parameters .* got tuple",
        ),
        (
            wrong(clip_grad_norm_, linear, 1.0),
            TypeError,
            "parameters must be tensors, .* got Linear",
        ),
        (
            wrong(clip_grad_norm_, linear.weight, "1"),
            TypeError,
            "max_norm must be a number, got '1'",
        ),
        (wrong(clip_grad_norm_, linear.weight, -1.0), ValueError, "max_norm must be at least 0"),
        (
            wrong(clip_grad_norm_, linear.weight, torch.tensor(-1.0)),
            ValueError,
            "max_norm must be at least 0, got -1.0",
        ),
        (
            wrong(clip_grad_norm_, linear.weight, torch.ones(1)),
            TypeError,
            "max_norm must be a number, got tensor",
        ),
        (
            wrong(clip_grad_norm_, linear.weight, torch.tensor(True)),
            TypeError,
            "max_norm must be a number, got True",
        ),
        (wrong(clip_grad_norm_, linear.weight, math.nan), ValueError, "max_norm .* got nan"),
        (
            wrong(clip_grad_norm_, linear.weight, 1.0, "pp"),
            TypeError,
            "pp_group must be .* got str",
        ),
        (
            wrong(parameter_groups, linear.weight),
            TypeError,
            "parameters .* got one: put it into a li",
        ),
        (wrong(parameter_groups, linear.named_parameters()), TypeError, "parameters .* got tuple"),
        (wrong(parameter_groups, [{"params": []}]), TypeError, "parameters .* got dict"),
        (wrong(parameter_groups, linear), TypeError, "parameters must be tensors, .* got Linear"),
        (wrong(Checkpointer, 3), TypeError, "folder must be of type str or PathLike, got int"),
        (wrong(Checkpointer, "x", keep="2"), TypeError, "keep must be an int, got '2'"),
        (wrong(Checkpointer, "x", keep=1.5), TypeError, "keep must be an int, got 1.5"),
        (wrong(Checkpointer, "x", keep=0), ValueError, "keep must be at least 1, got 0"),
        (wrong(Checkpointer, "x", asynchronous=1), TypeError, "asynchronous must be of type bool"),
        (
            wrong(Checkpointer, "x", timeout=60),
            TypeError,
            "timeout must be of type timedelta, got int",
        ),
        (wrong(entered, distributed, 60), TypeError, "timeout must be of type timedelta, got int"),
        (wrong(entered, distributed, timedelta(0)), ValueError, "timeout must be positive, got 0"),
        (wrong(entered, count_load, [linear]), TypeError, "model must be of type Module, got list"),
        (
            wrong(entered, time_phases, 0.5),
            TypeError,
            "device must be of type .* got float",
        ),
        (
            wrong(materialize, linear.weight, "cpu"),
            TypeError,
            "model must .* Module, got Parameter",
        ),
        (
            wrong(materialize, linear, None),
            TypeError,
            "device must be of type device or str or int, got No",
        ),
        (wrong(entered, time_phases, "gpu"), ValueError, "device must be .* got 'gpu'"),
        (wrong(materialize, linear, "gpu"), ValueError, "device must be .* got 'gpu'"),
        (wrong(materialize, linear, "meta"), ValueError, "device must be one that holds values"),
        (
            wrong(init_normal_rows_, torch.ones(3), 1.0),
            ValueError,
            r"table must .* of shape \(3,\)",
        ),
        (wrong(init_normal_rows_, torch.eye(3).int(), 1.0), TypeError, "table must .* torch.int32"),
        (wrong(init_normal_rows_, torch.eye(3), "1"), TypeError, "std must be a number, got '1'"),
        (wrong(init_normal_rows_, torch.eye(3), -1), ValueError, "std must be at least 0, got -1"),
        (wrong(ExpertParallel, dispatcher=True), ValueError, "dispatcher must be .* got True"),
        (wrong(ExpertParallel, capacity=1.25), ValueError, "capacity must be .* got 1.25"),
        (wrong(export_tensors, None, names), TypeError, "path must be of type str or PathLike"),
        (wrong(export_tensors, "x", {"a": sparse}), TypeError, "a must be a dense tensor"),
        (wrong(export_tensors, "x", {1: sparse}), TypeError, "names of tensors must be .* got 1"),
        (wrong(export_tensors, "x", linear), TypeError, "tensors must map .* got a Linear"),
        (
            wrong(export_tensors, "x", {"a": torch.eye(2, device="meta")}),
            ValueError,
            "a must have mem",
        ),
        (
            wrong(import_tensors, "x", {"a": torch.eye(2, device="meta")}),
            ValueError,
            "a must have mem",
        ),
        (wrong(import_tensors, b"x", names), TypeError, "path must be of type str or PathLike"),
    ],
)
def test_a_wrong_argument_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("save", (1, linear, None), "optimizer must be of type Optimizer, got NoneType"),
        ("save", (1, linear.state_dict(), None), "model must be of type Module, got OrderedDict"),
        ("save", (True, linear, None), "step must be an int, got True"),
        ("save", (1.0, linear, None), "step must be an int, got 1.0"),
        ("save", (-1, linear, None), "step must be at least 0, got -1"),
        ("load", (1, linear, {}), "optimizer must be of type Optimizer, got dict"),
        ("load", (None, linear, None), "step must be an int, got None"),
        ("progress", ("1",), "step must be an int, got '1'"),
        ("progress", (-1,), "step must be at least 0, got -1"),
        ("load", (7, linear, None), "there is no checkpoint of step 7 in .*, steps saved: 1$"),
    ],
)
def test_a_wrong_argument_of_a_checkpointer_is_named(
    method: str, args: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    optimizer = torch.optim.SGD(linear.parameters())
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, linear, optimizer)
    with pytest.raises(ValueError if -1 in args or 7 in args else TypeError, match=message):
        getattr(checkpoints, method)(*args)
    for error, progress, complaint in (
        (TypeError, [1], "progress must be of type Mapping, got list"),
        (TypeError, {1: 2}, "progress must have strings as names, got 1"),
        (TypeError, {"a": sparse}, "progress must be serializable as JSON: .* Tensor"),
        (ValueError, {"step": 1}, 'progress must not have "step"'),
        (ValueError, {"a": circular}, "progress must be serializable as JSON: Circular"),
        (ValueError, {"a": deep}, "progress must be serializable as JSON: .*recursion"),
    ):
        wrong_progress: Any = progress
        with pytest.raises(error, match=complaint):
            checkpoints.save(2, linear, optimizer, wrong_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def wrong_ep_sizes() -> None:
    for ep_size, error, message in (
        ("1", TypeError, "ep_size must be an int, got '1'"),
        (True, TypeError, "ep_size must be an int, got True"),
        (1.0, TypeError, "ep_size must be an int, got 1.0"),
        (0, ValueError, "ep_size must be at least 1, got 0"),
        (2, ValueError, "ep_size must divide the number of ranks = 1, got 2"),
    ):
        given: Any = ep_size
        with pytest.raises(error, match=message):
            Runtime.of_world(torch.device("cpu"), given)


def test_a_wrong_ep_size_is_named(rank_pools: RankPools) -> None:
    rank_pools.run(1, wrong_ep_sizes)

"""Optimizers come out of a checkpoint as they went in, whatever state they were in."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPools, rank_device
from sharded import whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

OPTIONS: dict[str, dict[str, Any]] = {
    "Adagrad": {"weight_decay": 0.1, "initial_accumulator_value": 0.3},
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "ASGD": {"weight_decay": 0.1, "t0": 1.0},
    "LBFGS": {"max_iter": 2, "history_size": 3},
    "RMSprop": {"weight_decay": 0.1, "momentum": 0.5, "centered": True},
    "Rprop": {},
    "SGD": {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.3},
}
# Optimizers of torch.optim that cannot step on such tensors, or on sharded ones, in some version.
CANNOT_STEP = {"SparseAdam", "Adafactor", "Rprop", "LBFGS"}


def optimizers() -> list[str]:
    found = {name: kind for name, kind in vars(torch.optim).items() if inspect.isclass(kind)}
    return [
        name
        for name, kind in found.items()
        if issubclass(kind, Optimizer) and kind is not Optimizer
    ]


class Tables(nn.Module):
    """Two matrices, sharded by rows and by columns or whole on every rank."""

    def __init__(self, sharded: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = torch.randn(7, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
        if sharded:
            from flash_moe_dist.runtime import Runtime

            mesh = Runtime.of_world(rank_device()).ep_mesh
            first = distribute_tensor(first, mesh, [Shard(0)])
            second = distribute_tensor(second, mesh, [Shard(1)])
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self) -> Tensor:
        # Gradients with a size that differs from step to step.
        loss = self.first.square().sum() + (self.second - 1).pow(4).sum()
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


def build(name: str, model: nn.Module, **options: Any) -> Optimizer:
    options = {"lr": 0.05, **OPTIONS.get(name, {}), **options}
    if "weight_decay" in inspect.signature(getattr(torch.optim, name)).parameters:
        options.setdefault("weight_decay", 0.1)
    found: Optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    return found


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Parameters, state and options, with dtypes and layouts."""
    found: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                collect(f"{name}.{key}", one)
        elif isinstance(value, list):
            for number, one in enumerate(value):
                collect(f"{name}.{number}", one)
        elif isinstance(value, DTensor):
            # Scalars count as replicated in DTensor operations. Muon of torch 2.11
            # keeps whole moments on every rank.
            of_parameter = value.ndim and not isinstance(optimizer, torch.optim.Muon)
            placements = value.placements if of_parameter else None
            found[name] = (value.dtype, placements, whole(value).tolist())
        elif isinstance(value, Tensor):
            found[name] = (value.dtype, None, value.tolist())
        else:
            found[name] = value

    collect("model", dict(model.named_parameters()))
    collect("optimizer", optimizer.state_dict())
    return found


def resume_everywhere(folder: str, sharded: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Differences from an uninterrupted run after three steps, for each optimizer."""
    from flash_moe_dist.checkpoint import Checkpointer

    differing: dict[str, Any] = {}
    for name in optimizers():
        model = Tables(sharded, dtype)
        optimizer = build(name, model)
        try:
            train(model, optimizer, 3)
        except RuntimeError as error:
            if name not in CANNOT_STEP:
                differing[name] = str(error)
            continue
        checkpoints = Checkpointer(Path(folder) / name, keep=3)
        saved, expected = [], everything(model, optimizer)
        model = Tables(sharded, dtype)
        optimizer = build(name, model)
        for step in range(3):
            checkpoints.save(step, model, optimizer)
            saved.append(everything(model, optimizer))
            train(model, optimizer, 1)
        differing[f"{name}, saved three times"] = difference(everything(model, optimizer), expected)
        for step in range(3):
            # At one step also into an optimizer that has state.
            for used in ("new", "used")[: 1 + (step == 1)]:
                model = Tables(sharded, dtype)
                optimizer = build(name, model)
                train(model, optimizer, 1 if used == "used" else 0)
                checkpoints.load(step, model, optimizer)
                loaded = everything(model, optimizer)
                train(model, optimizer, 3 - step)
                what = f"{name}, {used}, at {step}"
                differing[f"{what}, loaded"] = difference(loaded, saved[step])
                differing[f"{what}, ended"] = difference(everything(model, optimizer), expected)
        checkpoints.close()
    return {name: one for name, one in differing.items() if one}


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    names = sorted(one.keys() | other.keys())
    return {
        name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)
    }


@pytest.mark.parametrize(
    ("ranks", "sharded", "dtype"),
    [(2, True, torch.float32), (1, True, torch.bfloat16), (1, False, torch.float32)],
)
def test_every_optimizer_goes_on_bit_for_bit(
    ranks: int, sharded: bool, dtype: torch.dtype, tmp_path: Path, rank_pools: RankPools
) -> None:
    args = (str(tmp_path), sharded, dtype)
    for differing in rank_pools.run(ranks, resume_everywhere, *args):
        assert differing == {}


def freeze_first(model: Tables, optimizer: Optimizer) -> None:
    model.first.requires_grad_(False)


def thaw_first(model: Tables, optimizer: Optimizer) -> None:
    model.first.requires_grad_(True)


def train_two(model: Tables, optimizer: Optimizer) -> None:
    train(model, optimizer, 2)


def leave_gradients(model: Tables, optimizer: Optimizer) -> None:
    model().backward()


def make_lr_a_tensor(model: Tables, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0625)


def schedule(model: Tables, optimizer: Optimizer) -> None:
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)


# What happens before a checkpoint is saved, then to the new model that it is loaded into.
HISTORIES = {
    "no gradient so far": ([], []),
    "one has had no gradient so far": ([freeze_first, train_two, thaw_first], []),
    "frozen from the start": ([freeze_first, train_two], [freeze_first]),
    "frozen, then trained": ([freeze_first, train_two, thaw_first, train_two], [train_two]),
    "trained, then frozen": ([train_two, freeze_first, train_two], [freeze_first]),
    "frozen here only": ([train_two], [freeze_first]),
    "frozen there only": ([freeze_first, train_two], [train_two]),
    "learning rate as a tensor": ([make_lr_a_tensor, train_two], [make_lr_a_tensor]),
    "as a tensor there only": ([make_lr_a_tensor, train_two], []),
    "as a tensor here only": ([train_two], [make_lr_a_tensor, train_two]),
    "gradients left at save": ([leave_gradients], []),
    "gradients left at save and load": ([train_two, leave_gradients], [leave_gradients]),
    "gradients left at load": ([], [leave_gradients]),
    "a scheduler here and there": ([schedule, train_two], [schedule]),
    "a scheduler there only": ([schedule, train_two], []),
}


def odd_states(folder: str, history: str, sharded: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Differences of the state after loading, and of gradients after saving and loading."""
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder))
    differing: dict[str, Any] = {}
    touched: dict[str, Any] = {}
    for name in ("Adam", "SGD"):
        before, after = HISTORIES[history]
        model, other = Tables(sharded), Tables(sharded)
        optimizer, other_optimizer = build(name, model), build(name, other)
        for happens in before:
            happens(model, optimizer)
        for happens in after:
            happens(other, other_optimizer)
        gradients = gradients_of(model, other)
        saved = everything(model, optimizer)
        step = 1 + (checkpoints.newest() or 0)
        checkpoints.save(step, model, optimizer)
        differing |= difference(everything(model, optimizer), saved)
        checkpoints.load(step, other, other_optimizer)
        differing |= difference(everything(other, other_optimizer), saved)
        touched |= difference(gradients_of(model, other), gradients)
        for one, its_optimizer in ((model, optimizer), (other, other_optimizer)):
            its_optimizer.zero_grad()
            thaw_first(one, its_optimizer)
            train(one, its_optimizer, 2)
        differing |= difference(everything(other, other_optimizer), everything(model, optimizer))
    checkpoints.close()
    return differing, touched


def gradients_of(*models: nn.Module) -> dict[str, Any]:
    return {
        f"{name} of {number}": str(one.grad)
        for number, model in enumerate(models)
        for name, one in model.named_parameters()
    }


@pytest.mark.parametrize("history", HISTORIES)
def test_every_state_comes_back(history: str, tmp_path: Path, rank_pools: RankPools) -> None:
    """Saving and loading also leave gradients as they are."""
    for sharded in (True, False):
        args = (str(tmp_path / str(sharded)), history, sharded)
        assert rank_pools.run(1, odd_states, *args) == [({}, {})]


def replace_parameters(model: Tables) -> Optimizer:
    optimizer = build("Adam", model)
    model.first = nn.Parameter(model.first.detach().clone())
    return optimizer


def with_scheduler(model: Tables) -> Optimizer:
    optimizer = build("Adam", model)
    schedule(model, optimizer)
    return optimizer


# Optimizers that cannot be loaded into, with patterns of the messages.
REFUSED: dict[str, tuple[Callable[[Tables], Optimizer], str]] = {
    "scheduler added": (
        with_scheduler,
        r"has no initial_lr in param_groups\[0\], which the optimizer has here: if a learning rate "
        r"scheduler was added since, load first, then make the scheduler",
    ),
    "group split": (
        lambda model: torch.optim.Adam([{"params": [model.first]}, {"params": [model.second]}]),
        r"was saved with parameter groups of 2 parameters, the optimizer has parameter groups of "
        r"1, 1 parameters: second was in param_groups\[0\], is in param_groups\[1\]; load into an "
        "optimizer with the groups of that time, then change them",
    ),
    "parameter left out": (
        lambda model: torch.optim.Adam([model.second]),
        r"first was in param_groups\[0\], is in none; load",
    ),
    "another kind": (
        lambda model: torch.optim.AdamW(model.parameters()),
        "different model or optimizer: optimizer.kind: saved Adam, here AdamW",
    ),
    "parameters replaced": (
        replace_parameters,
        r"got one of shape \(7, 4\) in param_groups\[0\] that is none; parallelize_module",
    ),
}


def refusals(folder: str) -> None:
    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder))
    model = Tables(sharded=True)
    optimizer = build("Adam", model)
    train(model, optimizer, 1)
    checkpoints.save(1, model, optimizer)
    for make_optimizer, message in REFUSED.values():
        model = Tables(sharded=True)
        optimizer = make_optimizer(model)
        before = everything(model, optimizer)
        with pytest.raises(ValueError, match=message):
            checkpoints.load(1, model, optimizer)
        assert everything(model, optimizer) == before
    model = Tables(sharded=True)
    optimizer = build("Adam", model)
    for value, message in (
        (print, r"optimizer\.param_groups\.0\.option is not read: "),
        ({1: 2.0}, r"optimizer\.param_groups\.0\.option must have strings as keys, got 1"),
    ):
        optimizer.param_groups[0]["option"] = value
        with pytest.raises((RuntimeError, TypeError), match=message):
            checkpoints.save(2, model, optimizer)
    assert [path.name for path in Path(folder).iterdir()] == ["step-00000001"]
    checkpoints.close()


def test_what_does_not_fit_is_said_in_words(tmp_path: Path, rank_pools: RankPools) -> None:
    """A refusal changes nothing in memory and saves nothing."""
    rank_pools.run(1, refusals, str(tmp_path))


def load_old(folder: str) -> None:
    """Load a checkpoint of earlier versions, torch's state dicts without the optimizer's kind."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    from flash_moe_dist.checkpoint import Checkpointer

    checkpoints = Checkpointer(Path(folder))
    for step, name in enumerate(("AdamW", "SGD")):
        model, other = Tables(sharded=True), Tables(sharded=True)
        optimizer, other_optimizer = build(name, model), build(name, other)
        train(model, optimizer, 2)
        in_model, in_optimizer = get_state_dict(model, optimizer)
        path = Path(folder) / f"step-{step:08d}"
        save({"model": in_model, "optimizer": in_optimizer}, checkpoint_id=path)
        (path / "progress.json").write_text(json.dumps({"step": step}))
        checkpoints.load(step, other, other_optimizer)
        assert difference(everything(other, other_optimizer), everything(model, optimizer)) == {}
    other_optimizer = build("AdamW", other)
    with pytest.raises(ValueError, match=r"has no amsgrad, betas, .*different model or optimizer"):
        checkpoints.load(1, other, other_optimizer)
    checkpoints.close()


def test_old_checkpoints_are_loaded(tmp_path: Path, rank_pools: RankPools) -> None:
    rank_pools.run(1, load_old, str(tmp_path))


def tied_tables(folder: str) -> None:
    from safetensors.torch import load_file

    from flash_moe_dist.checkpoint import Checkpointer
    from flash_moe_dist.export import export_tensors, import_tensors

    checkpoints = Checkpointer(Path(folder) / "checkpoints")
    models = [nn.Sequential(Tables(sharded=True), Tables(sharded=True)) for _ in range(4)]
    for model in models[:3]:
        model[1].first = model[0].first
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.05) for model in models]
    for _ in range(2):
        (models[0][0]() * 2 + models[0][1]()).backward()
        optimizers[0].step()
    checkpoints.save(1, models[0], optimizers[0])
    checkpoints.load(1, models[1], optimizers[1])
    path = Path(folder) / "tied.safetensors"
    export_tensors(path, models[0].state_dict())
    import_tensors(path, models[2].state_dict())
    for model in models[1:3]:
        assert model[0].first is model[1].first
        assert str(dict(model.named_parameters())) == str(dict(models[0].named_parameters()))
    loaded, saved = (everything(models[i], optimizers[i]) for i in (1, 0))
    assert difference(loaded, saved) == {}
    exported = load_file(path)
    assert torch.equal(exported["0.first"], exported["1.first"])
    assert torch.equal(exported["0.first"], whole(models[0].get_parameter("0.first")))
    with pytest.raises(ValueError, match=r"1\.first was in none, is in param_groups\[0\]"):
        checkpoints.load(1, models[3], optimizers[3])
    checkpoints.save(2, models[3], optimizers[3])
    with pytest.raises(ValueError, match=r"1\.first was in param_groups\[0\], is in none"):
        checkpoints.load(2, models[1], optimizers[1])
    checkpoints.close()


def test_tied_tables_stay_tied(tmp_path: Path, rank_pools: RankPools) -> None:
    """A checkpoint of tied tables is refused by untied ones, and the other way round."""
    rank_pools.run(2, tied_tables, str(tmp_path))

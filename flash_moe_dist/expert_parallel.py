"""Expert parallelism as a parallel style of torch.distributed.tensor.

T local tokens, K experts per token, H hidden size, E experts, e of them on this rank.
"""

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.weak import WeakIdKeyDictionary

from flash_moe.arguments import is_plain
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.environment import switch
from flash_moe.ops.expert_math import NeedsGrad, TableCollections
from flash_moe.ops.flash_expert import collecting_expert_func
from flash_moe.ops.pair_grads import pair_grads_of
from flash_moe_dist.agreement import (
    gather_objects,
    raise_differences,
    same_error_on_all_ranks,
)
from flash_moe_dist.data_parallel_sums import sum_over_mesh
from flash_moe_dist.dispatch.autograd import ShardedExperts
from flash_moe_dist.dispatch.capacity import DispatchStats, LayerDispatch, Transport
from flash_moe_dist.dispatch.comm_volume import DispatcherName, ElementSizes, cheaper_dispatcher
from flash_moe_dist.dispatch.handshake import LayerSettings
from flash_moe_dist.initialization import init_normal_rows_

DispatcherChoice = Literal["auto", "all_to_all", "all_gather"]
Capacity = Literal["auto"] | None
# Layers named so far in this process, and copies made of each, by its name.
_num_layers = 0
_num_copies: Counter[str] = Counter()
# Sharded parameter by the parameter it was made from, which other modules may still hold.
_sharded_from = WeakIdKeyDictionary()


class ExpertParallel(ParallelStyle):
    """Parallel style that gives each rank of a mesh its share of a layer's experts.

        parallelize_module(model, ep_mesh, {"layers.*.moe.experts": ExpertParallel()})

    In a forward pass, each rank sends hidden states to the ranks that own the chosen experts, and
    adds up the partial sums that they send back; in a backward pass, gradients travel the same way.

    It works on any module that owns its tables as parameters of shape (E, H) and calls
    `self.expert_func(hidden_states, down_weights, up_weights, indices, routing_weights)`, as
    `flash_moe.FlashExperts` does. Its parameters become DTensors sharded on dim 0 over the mesh;
    E need not divide by the number of ranks. Values are those of the first rank of the mesh;
    tables on the meta device stay there, and get their values from `flash_moe_dist.materialize`.
    Tables that several modules share stay shared, if the style is applied to each of them; give
    them to `fully_shard` in one call with a list of these modules.

    If a key of the plan matches no module, `parallelize_module` warns and leaves the layers as they
    are; within `flash_moe_dist.distributed` it raises instead.

    Each forward and backward pass of the module is then collective over the mesh: every rank
    takes part, with any number of tokens of its own, zero included. Ranks are taken to be data
    parallel, with a loss averaged over them: gradients of the tables are those of the average
    loss over the ranks of the mesh. If there are more ranks than the mesh has, apply
    `fully_shard` over the other axis to the module too: it averages over that.

    A model that cannot call the module on a rank, because its own checks or router failed, can
    have the error raised on all ranks by `module.expert_func.fail(error)`. How often each way to
    dispatch ran is in `module.expert_func.stats`.

    A sharded layer cannot be captured in a CUDA graph: with exact counts the host waits for the
    counts, with static capacity it confirms the pass after launching it.

    Args:
        dispatcher: which rows travel. "all_to_all" sends a token's row to the ranks that own some
            of its experts; "all_gather" sends every row to every rank, which moves as much where
            tokens use nearly all ranks, in static shapes; "auto" takes the cheaper by
            `flash_moe_dist.dispatch.comm_volume.cheaper_dispatcher`, from shapes alone.
        transport: what carries rows and sums. "nccl": collectives of torch.distributed, by the
            backend of the process group, which is gloo on CPUs. "symmetric_memory": ranks read and
            write each other's memory; takes part in passes with static capacity, and implies
            "all_gather". "auto": symmetric memory where the ranks can have it.
        capacity: "auto" makes passes by all_gather with static capacity, learned from a pass with
            exact counts, where Triton kernels run; a pass that does not fit is noticed and runs
            again with exact counts, so no pair is ever dropped. None: exact counts in every pass.

    Raises:
        ValueError: an option is none of these, or two of them exclude each other. When applied, on
            every rank: the mesh has more than one dimension, the module's parameters are not
            tables of one shape or are sharded already, or the ranks differ in shapes, dtypes or
            options.
        TypeError: when applied, on every rank: the module has no `expert_func`.
    """

    def __init__(
        self,
        dispatcher: DispatcherChoice = "auto",
        transport: Transport = "auto",
        capacity: Capacity = "auto",
    ) -> None:
        super().__init__()
        _check_options(dispatcher, transport, capacity)
        self.dispatcher, self.transport, self.capacity = dispatcher, transport, capacity

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(
                f"device_mesh must have one dimension, the ep axis, got {device_mesh.ndim}"
            )
        group = device_mesh.get_group()
        with same_error_on_all_ranks(group):
            tables = _tables_of(module, device_mesh)
        described = {
            name: (tuple(table.shape), table.dtype, "meta" if table.is_meta else "with values")
            for name, table in tables.items()
        }
        options = {
            "dispatcher": self.dispatcher,
            "transport": self.transport,
            "capacity": self.capacity,
        }
        raise_differences({"tables": described, **options}, group)
        for name, table in tables.items():
            # One table may have two names, in one module or in several.
            if table not in _sharded_from:
                sharded = distribute_tensor(
                    table.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank
                )
                _sharded_from[table] = nn.Parameter(sharded, requires_grad=table.requires_grad)
            module.register_parameter(name, _sharded_from[table])
        hooked: Any = module
        hooked.expert_func = ExpertParallelFunc(
            device_mesh, self.dispatcher, self.transport, self.capacity, _new_name(group)
        )
        if hasattr(module, "normal_rows_"):
            hooked.normal_rows_ = init_normal_rows_
        return module


def _check_options(dispatcher: DispatcherChoice, transport: Transport, capacity: Capacity) -> None:
    # A wrong value is refused here, before ranks wait for each other.
    switch("FLASH_MOE_PEER_MEMORY", True)
    given = {
        "dispatcher": (dispatcher, get_args(DispatcherChoice)),
        "transport": (transport, get_args(Transport)),
        "capacity": (capacity, ("auto", None)),
    }
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    if transport == "symmetric_memory" and (dispatcher == "all_to_all" or capacity is None):
        raise ValueError(
            "transport 'symmetric_memory' needs dispatcher 'all_gather' or 'auto' and capacity "
            f"'auto', got dispatcher {dispatcher!r} and capacity {capacity!r}"
        )


def _new_name(group: ProcessGroup) -> str:
    """Name a layer, alike on all ranks of the group and unlike any other layer. Collective."""
    global _num_layers
    # A rank may also have layers of other groups.
    number = max(gather_objects(_num_layers, group))
    _num_layers = number + 1
    return f"layer {number}"


def _tables_of(module: nn.Module, mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    if not hasattr(module, "expert_func"):
        raise TypeError(
            f"{type(module).__name__} must call its tables through an attribute expert_func, "
            "as flash_moe.FlashExperts does; found none"
        )
    tables = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    for name, table in tables.items():
        if isinstance(table, DTensor):
            raise ValueError(
                f"{name} of {type(module).__name__} must be a plain tensor, got a DTensor over "
                f"{table.device_mesh}: apply ExpertParallel once, and before fully_shard"
            )
        shared: DTensor | None = _sharded_from.get(table)
        if shared is not None and shared.device_mesh != mesh:
            raise ValueError(
                f"{name} of {type(module).__name__} is shared with a module that is sharded over "
                f"{shared.device_mesh}, and must be sharded over the same mesh, got {mesh}"
            )
    shapes = {table.shape for table in tables.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"parameters of {type(module).__name__} must be tables of one shape "
            "(num_experts, hidden_size), got "
            + str({name: tuple(table.shape) for name, table in tables.items()})
        )
    return tables


class ExpertParallelFunc:
    """`triton_flash_expert_func` over tables that are sharded on dim 0 over `ep_mesh`.

    Args:
        ep_mesh: the ranks that own the experts.
        dispatcher, transport, capacity: options of `ExpertParallel`.
        layer: name that errors give the layer, the same on all ranks. Ranks that do not call
            layers of the same name in the same order raise an error.

    Attributes:
        counters: each is called with the local ids and the routing weights of every forward pass
            (`flash_moe_dist.count_load`).
    """

    def __init__(
        self,
        ep_mesh: DeviceMesh,
        dispatcher: DispatcherChoice = "auto",
        transport: Transport = "auto",
        capacity: Capacity = "auto",
        layer: str = "an unnamed layer",
    ) -> None:
        _check_options(dispatcher, transport, capacity)
        self.ep_mesh, self.ep_size, self.layer = ep_mesh, ep_mesh.size(), layer
        self.dispatcher, self.transport, self.capacity = dispatcher, transport, capacity
        self.counters: list[Callable[[Tensor, Tensor], None]] = []
        self._token_mesh: DeviceMesh | None = None

    @cached_property
    def _layer(self) -> LayerDispatch:
        # Made at the first pass: a saved model is loaded where there are no process groups yet.
        has_capacity = self.capacity is not None
        return LayerDispatch(self.ep_mesh.get_group(), self.layer, self.transport, has_capacity)

    @property
    def stats(self) -> DispatchStats:
        """How often each way to dispatch ran on this rank; all zero on a mesh of one rank."""
        return self._layer.stats

    def __repr__(self) -> str:
        return (
            f"ExpertParallelFunc({self.layer}, ep_size={self.ep_size}, "
            f"dispatcher={self.dispatcher!r}, transport={self.transport!r}, "
            f"capacity={self.capacity!r})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling drops load counters, statistics and the learned capacity plan.
        return _copy, (self.ep_mesh, self.dispatcher, self.transport, self.capacity, self.layer)

    def __deepcopy__(self, memo: dict[int, object]) -> "ExpertParallelFunc":
        # A copied model (an average of weights, say) uses the same process group.
        return _copy(self.ep_mesh, self.dispatcher, self.transport, self.capacity, self.layer)

    @torch.compiler.disable
    def fail(self, error: Exception) -> NoReturn:
        """Raise `error` on every rank, in place of a call that this rank cannot make.

        The other ranks raise it from their calls.
        """
        if self.ep_size > 1:
            self._layer.fail(error, torch.device(self.ep_mesh.device_type))
        raise error

    @torch.compiler.disable
    def sum_over_ranks(self, sums: Tensor, table: Tensor) -> None:
        """Add up a tensor, in place, over all ranks of the mesh that `table` is sharded over."""
        mesh = table.device_mesh if isinstance(table, DTensor) else self.ep_mesh
        # With fully_shard, tables that were gathered for a pass are on the ep axis alone.
        if self._token_mesh is None or mesh.ndim > self._token_mesh.ndim:
            self._token_mesh = mesh
        sum_over_mesh(sums, self._token_mesh)

    # The host reads the counts of each pass, so compiled graphs end before and begin after it.
    @torch.compiler.disable
    def __call__(
        self,
        hidden_states: Tensor,
        down_weights: Tensor,
        up_weights: Tensor,
        indices: Tensor,
        routing_weights: Tensor,
    ) -> Tensor:
        """Arguments and result as `triton_flash_expert_func`, with DTensor tables.

        Partial sums travel in float32 at least, so that results are rounded once, as on one rank.

        Raises:
            TypeError, ValueError: on every rank, if any rank's input is wrong.
            RuntimeError: on every rank, if the tables have no values yet, or if symmetric memory is
                asked for and cannot be had; or if a second derivative is asked for.
        """
        try:
            down_eH, up_eH = self._local_rows(down_weights), self._local_rows(up_weights)
        except (TypeError, RuntimeError) as error:
            self.fail(error)
        num_experts, hidden_size = down_weights.shape
        collections = TableCollections(pair_grads_of(down_weights), pair_grads_of(up_weights))
        if self.ep_size == 1:
            local = (hidden_states, down_eH, up_eH, indices, routing_weights)
            out = collecting_expert_func(*local, collections)
            for count in self.counters:
                count(indices, routing_weights)
            return out
        inputs = (hidden_states, down_eH, up_eH, routing_weights)
        is_grad_enabled = torch.is_grad_enabled()
        needs_grad = NeedsGrad(
            *(is_grad_enabled and isinstance(one, Tensor) and one.requires_grad for one in inputs)
        )
        dispatcher = self._dispatcher_for(hidden_states, indices, routing_weights, down_eH)
        settings = LayerSettings(
            num_experts=num_experts,
            hidden_size=hidden_size,
            table_dtypes=(down_eH.dtype, up_eH.dtype),
            device=down_eH.device,
            dispatcher="all_gather" if self.transport == "symmetric_memory" else self.dispatcher,
            needs_grad=needs_grad,
        )
        out_TH: Tensor = ShardedExperts.apply(
            hidden_states,
            down_eH,
            up_eH,
            indices,
            routing_weights,
            self._layer,
            dispatcher,
            settings,
            tuple(self.counters),
            collections,
        )
        return out_TH

    def _dispatcher_for(
        self, hidden_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor, down_eH: Tensor
    ) -> DispatcherName:
        if self.transport == "symmetric_memory":
            return "all_gather"
        if self.dispatcher != "auto":
            return self.dispatcher
        inputs = (hidden_TH, indices_TK, weights_TK)
        if not all(is_plain(one) and one.ndim == 2 for one in inputs):
            # Wrong input, which every dispatcher refuses.
            return "all_to_all"
        sizes = ElementSizes(
            ep_size=self.ep_size,
            hidden_size=hidden_TH.shape[1],
            hidden_bytes=hidden_TH.element_size(),
            sum_bytes=accumulator_dtype(hidden_TH.dtype, down_eH.dtype).itemsize,
            weight_bytes=weights_TK.element_size(),
        )
        return cheaper_dispatcher(sizes, indices_TK.shape[1])

    def _local_rows(self, table: Tensor) -> Tensor:
        if not isinstance(table, DTensor):
            raise TypeError(f"tables must be DTensors sharded by ExpertParallel, got {type(table)}")
        if table.device_mesh != self.ep_mesh or tuple(table.placements) != (Shard(0),):
            raise TypeError(
                f"tables must be sharded on dim 0 over {self.ep_mesh}, got placements "
                f"{table.placements} over {table.device_mesh}; with fully_shard, call the module "
                "whose forward pass gathers them"
            )
        if pair_grads_of(table) is None or not torch.is_grad_enabled():
            local: Tensor = table.to_local()
        else:
            # In torch 2.11 the backward pass of to_local makes zeros of a gradient that is None.
            detached: Any = table.detach()
            local = detached.to_local().requires_grad_(table.requires_grad)
        if local.is_meta:
            raise RuntimeError(
                "tables are on the meta device: give them values by flash_moe_dist.materialize"
            )
        return local


def _copy(
    ep_mesh: DeviceMesh,
    dispatcher: DispatcherChoice,
    transport: Transport,
    capacity: Capacity,
    layer: str,
) -> ExpertParallelFunc:
    """Copy the function of the layer of that name, under the next name for a copy of it."""
    _num_copies[layer] += 1
    name = f"copy {_num_copies[layer]} of {layer}"
    return ExpertParallelFunc(ep_mesh, dispatcher, transport, capacity, name)

"""Expert parallelism as a parallel style of torch.distributed.tensor."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from flash_moe.ops.flash_expert import ragged_flash_expert_func, triton_flash_expert_func
from flash_moe_dist.dispatch import AllToAllDispatcher


class ExpertParallel(ParallelStyle):
    """Shards the tables of an experts module over a mesh and routes tokens to their owners.

        parallelize_module(model, ep_mesh, {"layers.*.moe.experts": ExpertParallel()})

    Works on any module that owns its tables as parameters of shape (E, H) and calls
    `self.expert_func(hidden_states, down_weights, up_weights, indices, routing_weights)`, as
    `flash_moe.FlashExperts` does. Its parameters become DTensors sharded on dim 0 over the mesh;
    E need not divide by the number of ranks. All ranks must hold the same values beforehand,
    or the first rank's are taken. Applying the style raises ValueError if the mesh has more
    than one dimension or the parameters are not tables of one shape, TypeError if the module
    has no `expert_func`.

    Each forward and backward pass of the module is then collective over the mesh: every rank
    takes part, with any number of tokens of its own, zero included. Ranks are taken to be data
    parallel, with a loss averaged over them: gradients of the tables are those of the average
    loss over the ranks of the mesh.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(
                f"device_mesh must have one dimension, the ep axis, got {device_mesh.ndim}"
            )
        if not hasattr(module, "expert_func"):
            raise TypeError(
                f"{type(module).__name__} must call its tables through an attribute expert_func, "
                "as flash_moe.FlashExperts does; found none"
            )
        tables = dict(module.named_parameters(recurse=False))
        shapes = {table.shape for table in tables.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(
                f"parameters of {type(module).__name__} must be tables of one shape "
                "(num_experts, hidden_size), got "
                + str({name: tuple(table.shape) for name, table in tables.items()})
            )
        for name, table in tables.items():
            sharded = distribute_tensor(
                table.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank
            )
            parameter = nn.Parameter(sharded, requires_grad=table.requires_grad)
            module.register_parameter(name, parameter)
        hooked: Any = module
        hooked.expert_func = ExpertParallelFunc(device_mesh)
        return module


class ExpertParallelFunc:
    """`triton_flash_expert_func` over tables that are sharded on dim 0 over `ep_mesh`."""

    def __init__(self, ep_mesh: DeviceMesh) -> None:
        self.ep_size = ep_mesh.size()
        self.dispatcher = AllToAllDispatcher(ep_mesh.get_group())

    def __deepcopy__(self, memo: dict[int, object]) -> "ExpertParallelFunc":
        # A copied model (an average of weights, say) talks over the same process group.
        return self

    def __call__(
        self,
        hidden_states: Tensor,
        down_weights: Tensor,
        up_weights: Tensor,
        indices: Tensor,
        routing_weights: Tensor,
    ) -> Tensor:
        """Arguments and result as `triton_flash_expert_func`, with DTensor tables.

        Raises:
            TypeError, ValueError: on every rank, if any rank's input is wrong.
        """
        num_experts, hidden_size = down_weights.shape
        down_eH, up_eH = _local_rows(down_weights), _local_rows(up_weights)
        if self.ep_size == 1:
            return triton_flash_expert_func(hidden_states, down_eH, up_eH, indices, routing_weights)
        received, metadata = self.dispatcher.dispatch(
            hidden_states, indices, routing_weights, num_experts, hidden_size, down_eH.device
        )
        partial_RH = ragged_flash_expert_func(
            received.hidden_RH,
            down_eH,
            up_eH,
            received.row_offsets,
            received.expert_ids_M,
            received.weights_M,
            weight_grad_scale=1 / self.ep_size,
        )
        return self.dispatcher.combine(partial_RH, metadata)


def _local_rows(table: Tensor) -> Tensor:
    if not isinstance(table, DTensor):
        raise TypeError(f"tables must be DTensors sharded by ExpertParallel, got {type(table)}")
    local: Tensor = table.to_local()
    return local

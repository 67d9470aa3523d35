"""Old names of `flash_moe_dist`, in the tables of `flash_moe.deprecated`."""

# Old module: new module.
MODULES = {
    "flash_moe_dist.collectives": "flash_moe_dist.dispatch.collectives",
    "flash_moe_dist.peer_memory": "flash_moe_dist.dispatch.symmetric_memory",
    "flash_moe_dist.sharding": "flash_moe_dist.dispatch.partition",
    "flash_moe_dist.steps": "flash_moe_dist.phases",
    "flash_moe_dist.volume": "flash_moe_dist.dispatch.comm_volume",
}
# Old name: new name, where more than the module has changed.
NAMES = {
    "flash_moe_dist.collectives.ALL_GATHER": (
        "flash_moe_dist.dispatch.collectives.ALL_GATHER_COLLECTIVE"
    ),
    "flash_moe_dist.collectives.ALL_TO_ALL": (
        "flash_moe_dist.dispatch.collectives.ALL_TO_ALL_COLLECTIVE"
    ),
    "flash_moe_dist.dispatch.AllGatherDispatcher": (
        "flash_moe_dist.dispatch.exact.AllGatherDispatcher"
    ),
    "flash_moe_dist.dispatch.AllToAllDispatcher": (
        "flash_moe_dist.dispatch.exact.AllToAllDispatcher"
    ),
    "flash_moe_dist.dispatch.ArrivingRows": "flash_moe_dist.dispatch.base.ArrivingRows",
    "flash_moe_dist.dispatch.DISPATCHERS": "flash_moe_dist.dispatch.exact.DISPATCHERS",
    "flash_moe_dist.dispatch.DispatchMetadata": "flash_moe_dist.dispatch.base.DispatchMetadata",
    "flash_moe_dist.dispatch.ReceivedTokens": "flash_moe_dist.dispatch.base.ReceivedTokens",
    "flash_moe_dist.dispatch.ReturningValues": "flash_moe_dist.dispatch.base.ReturningValues",
    "flash_moe_dist.dispatch.TokenDispatcher": "flash_moe_dist.dispatch.base.Dispatcher",
    "flash_moe_dist.dispatch.filled_up": "flash_moe_dist.dispatch.exact.pad_rows",
    "flash_moe_dist.dispatch.pairs_per_row": "flash_moe_dist.dispatch.base.expected_pairs_per_row",
    "flash_moe_dist.dispatch.sum_copies": "flash_moe_dist.dispatch.exact.sum_row_copies",
    "flash_moe_dist.dispatch.sum_over_ranks": "flash_moe_dist.dispatch.exact.sum_over_ranks",
    "flash_moe_dist.expert_parallel.Dispatcher": "flash_moe_dist.expert_parallel.DispatcherChoice",
    "flash_moe_dist.normal_rows_": "flash_moe_dist.init_normal_rows_",
    "flash_moe_dist.time_steps": "flash_moe_dist.time_phases",
    "flash_moe_dist.initialization.normal_rows_": "flash_moe_dist.init_normal_rows_",
    "flash_moe_dist.peer_memory.peer_memory_bytes": (
        "flash_moe_dist.dispatch.symmetric_memory.symmetric_memory_bytes"
    ),
    "flash_moe_dist.steps.STEPS": "flash_moe_dist.phases.PHASES",
    "flash_moe_dist.steps.step": "flash_moe_dist.phases.phase",
    "flash_moe_dist.steps.time_steps": "flash_moe_dist.time_phases",
    "flash_moe_dist.volume.Load": "flash_moe_dist.dispatch.comm_volume.PassVolume",
    "flash_moe_dist.volume.Widths": "flash_moe_dist.dispatch.comm_volume.ElementSizes",
}

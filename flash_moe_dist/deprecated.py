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

"""Expert parallelism: experts sharded over ranks, tokens sent to the ranks that own their experts.

What a training script imports, in the order in which it needs it:

    distributed, Runtime   join torchrun's process group; rank, device and meshes
    ExpertParallel         parallel style that shards the experts of a layer over a mesh
    sync_routers           give routers the ranks over which they add up their statistics
    materialize            allocate and initialize a model that was built on the meta device
    init_normal_rows_      initialize a sharded table of a module of your own
    parameter_groups       group parameters by mesh for a fused optimizer
    clip_grad_norm_        clip gradients that live on different meshes
    count_load             count how evenly experts and ranks are used (`ExpertLoad`)
    time_phases            measure the device time of dispatch, experts, combine, communication
    Checkpointer           save and load sharded checkpoints (`PartialLoadError`)
    same_error_on_all_ranks   raise an error of one rank on all of them

`flash_moe_dist.export` writes unsharded tensors to a safetensors file and reads them; it needs
`pip install flash-moe[export]`, so import it by its own name. `flash_moe_dist.dispatch` holds how
a pass travels between ranks.
"""

from flash_moe import __version__
from flash_moe.deprecated import register
from flash_moe_dist import deprecated
from flash_moe_dist.agreement import same_error_on_all_ranks
from flash_moe_dist.checkpoint import Checkpointer, PartialLoadError
from flash_moe_dist.data_parallel_sums import sync_routers
from flash_moe_dist.expert_parallel import ExpertParallel
from flash_moe_dist.gradients import clip_grad_norm_
from flash_moe_dist.initialization import init_normal_rows_, materialize
from flash_moe_dist.load import ExpertLoad, count_load
from flash_moe_dist.parameter_groups import parameter_groups
from flash_moe_dist.phases import time_phases
from flash_moe_dist.runtime import Runtime, distributed

__all__ = [
    "Checkpointer",
    "ExpertLoad",
    "ExpertParallel",
    "PartialLoadError",
    "Runtime",
    "__version__",
    "clip_grad_norm_",
    "count_load",
    "distributed",
    "init_normal_rows_",
    "materialize",
    "parameter_groups",
    "same_error_on_all_ranks",
    "sync_routers",
    "time_phases",
]

register(deprecated.MODULES, deprecated.NAMES)

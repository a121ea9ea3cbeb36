"""Memory beyond the devices: the optimizer's state in host memory or on its disk, in chunks."""

from jspeed.offload.files import FileStore
from jspeed.offload.host_adam import AdamRule, HostAdam, host_zeros
from jspeed.offload.host_optimizer import HOST_MEMORY, HostOptimizer, HostStep
from jspeed.offload.stores import ChunkStore, HostStore, State

__all__ = [
    "HOST_MEMORY",
    "AdamRule",
    "ChunkStore",
    "FileStore",
    "HostAdam",
    "HostOptimizer",
    "HostStep",
    "HostStore",
    "State",
    "host_zeros",
]

"""Memory beyond the devices: the optimizer's state in host memory or on its disk, in chunks."""

from __future__ import annotations

from jspeed.offload.files import FileStore
from jspeed.offload.host_adam import AdamRule, HostAdam
from jspeed.offload.stores import ChunkStore, HostStore, State

__all__ = ["AdamRule", "ChunkStore", "FileStore", "HostAdam", "HostStore", "State"]

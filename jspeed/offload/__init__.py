"""Memory beyond the device: optimizer state in host memory or on disk, kept in chunks."""

from __future__ import annotations

from jspeed.offload.files import FileStore
from jspeed.offload.stores import ChunkStore, HostStore, State

__all__ = ["ChunkStore", "FileStore", "HostStore", "State"]

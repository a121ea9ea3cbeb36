"""Checkpoints: global logical arrays under stable names, saved in the background."""

from jspeed.checkpoint.deferred import Deferred, made
from jspeed.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore", "Deferred", "made"]

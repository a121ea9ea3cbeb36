"""Where the programs of a run find the files of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class LayersOnDisk(Protocol):
    """Parameters of layers, and their gradients, on the disk: what programs ask for.

    Called by the threads that run the programs, with NumPy scalars. `device` is a device's place in
    the mesh. Nothing raises: what went wrong is kept for whoever waits for the program.
    """

    def fetch(self, path: str, device: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """A device's part of a layer of a parameter."""
        ...

    def left(
        self,
        path: str,
        device: np.ndarray,
        layer: np.ndarray,
        wanted: np.ndarray,
        after: np.ndarray,
    ) -> np.ndarray:
        """What a device left of a layer's gradient in this step; anything if it is not wanted."""
        ...

    def leave(
        self, path: str, device: np.ndarray, layer: np.ndarray, gradient: np.ndarray
    ) -> np.ndarray:
        """Takes a device's part of a layer's gradient; returns a float32 zero."""
        ...


@dataclass(eq=False)
class DiskPort:
    """Stands for files that are made after the layout; without any, programs can be compiled only.

    Attributes:
      files: of the run.
    """

    files: LayersOnDisk | None = None

"""Vectors in host memory that NumPy writes to and XLA reads, or updates, where they are."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64
_FLOAT32 = np.dtype(np.float32)


def host_zeros(length: int, dtype: np.dtype = _FLOAT32) -> np.ndarray:
    """A vector of zeros that begins at a multiple of 64 bytes: XLA reads such arrays where they
    are, and copies others."""
    memory = np.zeros(length * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + length * dtype.itemsize].view(dtype)


class XlaMemory:
    """Float32 vectors in XLA's own memory, which NumPy sees.

    XLA writes its results into the memory of an argument that is donated to it, but only where it
    allocated that itself; of NumPy's memory it makes a copy first.

    Args:
      device: one of the CPU backend's.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._arrays: dict[int, jax.Array] = {}  # by the address of its first byte

    def zeros(self, length: int) -> np.ndarray:
        """A vector of zeros; the memory lives as long as any view of it."""
        if not length:
            return host_zeros(0)
        array = jax.block_until_ready(jnp.zeros(length, _FLOAT32, device=self._device))
        address = array.unsafe_buffer_pointer()
        self._arrays[address] = array
        memory = (ctypes.c_float * length).from_address(address)
        weakref.finalize(memory, self._arrays.pop, address).atexit = False
        return np.ctypeslib.as_array(memory)

    def arrays(self, views: Sequence[np.ndarray]) -> tuple[jax.Array, ...] | None:
        """XLA's arrays behind vectors that `zeros` made; None where one is something else, or a
        part."""
        found = [self._arrays.get(view.ctypes.data) for view in views]
        whole = [
            array
            for array, view in zip(found, views, strict=True)
            if array is not None and array.shape == view.shape
        ]
        return tuple(whole) if len(whole) == len(found) else None

    def renew(self, views: Sequence[np.ndarray], arrays: Sequence[jax.Array]) -> None:
        """Takes results of a program that `arrays(views)` were donated to.

        Where XLA made copies after all, since something else uses an array, they are copied back.

        Raises:
          RuntimeError: it made copies and freed the memory.
        """
        for view, new in zip(views, arrays, strict=True):
            address = view.ctypes.data
            if new.unsafe_buffer_pointer() == address:
                self._arrays[address] = new
            elif self._arrays[address].is_deleted():
                raise RuntimeError(
                    "XLA freed the optimizer's state, which it was compiled to update in place. "
                    'Resume from the last checkpoint with pip install "jspeed[offload]", which '
                    "does without XLA here, and report this with your version of JAX."
                )
            else:
                view[...] = np.asarray(new)

"""Array I/O through Orbax: named global arrays to a folder and back, onto any sharding."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from jspeed.checkpoint.deferred import Deferred, registry
from jspeed.checkpoint.manifest import ArrayEntry, listed
from jspeed.core.errors import CheckpointError

BARRIER_TIMEOUT_MS = 600_000


def describe_arrays(arrays: Mapping[str, jax.Array | Deferred]) -> dict[str, ArrayEntry]:
    """Returns shape and dtype of every array, after checking that each can be saved.

    Raises:
      CheckpointError: a name is not a path, or a value is not an array, a typed PRNG key, or was
        donated.
    """
    entries = {}
    for path, array in arrays.items():
        if not isinstance(path, str) or not all(path.split("/")) or "\0" in path:
            raise CheckpointError(
                f'Array name {path!r}: expected names joined by "/", like "master/embed/kernel".'
            )
        if not isinstance(array, jax.Array | Deferred):
            raise CheckpointError(
                f'"{path}": expected a jax.Array, found {type(array).__name__}. Convert it with '
                "jax.numpy.asarray, or put plain numbers into the metadata."
            )
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise CheckpointError(
                f'"{path}" is a typed PRNG key. Save jax.random.key_data(key), and wrap it with '
                "jax.random.wrap_key_data after restoring."
            )
        entries[path] = ArrayEntry(tuple(array.shape), array.dtype.name)
    deleted = [
        f'"{path}"'
        for path, array in arrays.items()
        if isinstance(array, jax.Array) and array.is_deleted()
    ]
    if deleted:
        raise CheckpointError(
            f"These arrays were donated or deleted and cannot be saved: {listed(deleted)}. Save "
            "the state that the last step returned."
        )
    return entries


class ArrayWriter:
    """One save: `start` returns when the arrays are on the host, `finish` when on disk, deferred
    ones too."""

    def __init__(self) -> None:
        silence_orbax()
        # Uncompressed: floating-point weights hardly shrink, and compressing would take processor
        # time from the training that goes on meanwhile.
        handler = ocp.PyTreeCheckpointHandler(
            use_compression=False, type_handler_registry=registry()
        )
        self._checkpointer = ocp.AsyncCheckpointer(handler)

    def start(self, folder: Path, arrays: Mapping[str, jax.Array | Deferred]) -> None:
        """Copies `arrays` to the host and starts to write them into the new folder `folder`."""
        # Empty arrays have no bytes to write, and Orbax refuses them; the manifest alone brings
        # them back.
        stored = {path: array for path, array in arrays.items() if array.size}
        if stored:
            self._checkpointer.save(folder, args=ocp.args.PyTreeSave(stored))

    def finish(self) -> None:
        """Waits until every array is on disk, and raises what went wrong."""
        try:
            self._checkpointer.wait_until_finished()
        finally:
            self._checkpointer.close()


def read_arrays(
    folder: Path,
    entries: Mapping[str, ArrayEntry],
    like: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Reads the arrays that `like` names straight into its shardings, whatever sharding wrote them.

    Args:
      folder: what `ArrayWriter.start` wrote.
      entries: shape and dtype of every array in the folder.
      like: what to read; the shapes and dtypes are those of `entries`.

    Raises:
      Exception: whatever Orbax raises for data that is damaged.
    """
    silence_orbax()
    arguments = {
        path: ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=sharding_of(leaf),
            global_shape=entries[path].shape,
            dtype=leaf.dtype,
        )
        for path, leaf in like.items()
        if leaf.size
    }
    arrays: dict[str, jax.Array] = {}
    if arguments:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=dict.fromkeys(arguments, 0),
                    restore_args=arguments,
                    partial_restore=True,
                ),
            )
    return {path: arrays[path] if leaf.size else _empty(leaf) for path, leaf in like.items()}


def wait_for_processes(key: str) -> None:
    """Waits until every process of the run has come to the point named `key`."""
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=BARRIER_TIMEOUT_MS)


def silence_orbax() -> None:
    """Keeps Orbax's log records from the user: what matters of them is raised as an error."""
    # Adding a filter twice has no effect. Only Orbax's records are dropped; others that log through
    # absl stay.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    # A failing restore leaves a coroutine of Orbax behind, about which Python warns much later.
    warnings.filterwarnings(
        "ignore", r"coroutine 'Store\._get_array_metadatas' was never awaited", RuntimeWarning
    )


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname.replace("\\", "/")


def sharding_of(leaf: jax.ShapeDtypeStruct) -> Sharding:
    """Where an array is read to: one device if its description does not say."""
    return leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding_of(leaf))

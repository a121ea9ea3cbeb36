"""The parameters of layers, and their gradients, in files: what devices ask for while a program
runs, and what the update reads and writes between two programs."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jspeed.core.errors import OffloadError
from jspeed.layout.zero import Layout
from jspeed.offload.folders import PREFIX, ProcessFolder
from jspeed.offload.read_ahead import Buffer, Pool, ReadAhead
from jspeed.offload.stack_file import (
    WRITTEN_BEHIND,
    StackFile,
    StackRecords,
    gradient_records,
    parameter_records,
)
from jspeed.offload.stores import Wholeness

PARAMETERS, GRADIENTS = "parameters.bin", "gradients.bin"
_THREADS = 8
_ZERO = np.zeros((), np.float32)
_LOGGER = logging.getLogger("jspeed.offload")


class LayerFiles:
    """A layout's `params_on_host` and their gradients, on the disk. A `LayersOnDisk`.

    Devices read a few layers of each parameter ahead, into buffers that are all that host memory
    holds of them; gradients are written behind. Checksums are as those of `FileStore`, and the
    files as well are working memory and no checkpoint.

    What goes wrong while a program runs is kept, and devices get NaN until `settle` raises it: if
    one of them stopped, others would wait for it for ever.

    Args:
      directory: `nvme_path`, an existing folder.
      layout: with `params_on_host`, on devices.
      buffers: layers of each parameter that are in memory for each device, at least 2.
      accumulates: whether there are several microbatches.
      name: tells the files of several engines apart.
      process: the index of this process in the run.

    Raises:
      OffloadError: the folder cannot be used or another live process uses it, or the disk has too
        little room.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        layout: Layout,
        *,
        buffers: int,
        accumulates: bool,
        name: str = "parameters",
        process: int = 0,
    ) -> None:
        if buffers < 2:
            raise OffloadError(
                f'"zero_optimization.offload_param.buffer_count": {buffers}; expected at least 2: '
                "one layer in use and one being read."
            )
        mesh: Any = layout.mesh
        self._devices = list(mesh.devices.flat)
        self._ahead = buffers - 1
        self._pool = Pool()
        self._folder = ProcessFolder(Path(directory), f"{PREFIX}{name}-{process}")
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="jspeed-layers")
        self._files: dict[str, StackFile] = {}
        self._remove = weakref.finalize(
            self, _remove, self._folder, self._files, self._threads, os.getpid()
        )
        self._whole = Wholeness(f'The parameters of layers in "{self._folder.path}"')
        self._failure: OffloadError | None = None
        self._lock = threading.Lock()
        self._readers: dict[tuple[str, str, Any], ReadAhead] = {}
        self._writes: dict[tuple[str, Any], deque[tuple[int, Future[Buffer]]]] = {}
        try:
            self._make(PARAMETERS, parameter_records(layout))
            self.make_gradients(layout, accumulates=accumulates)
        except BaseException:
            self.close()
            raise

    @property
    def buffer_bytes(self) -> int:
        """Of host memory taken so far."""
        return self._pool.made

    def make_gradients(self, layout: Layout, *, accumulates: bool) -> None:
        """Makes room for gradients, in place of what there was."""
        self.settle()
        before = self._files.pop(GRADIENTS, None)
        if before is not None:
            before.file.remove()
        try:
            self._make(GRADIENTS, gradient_records(layout, accumulates=accumulates))
        except BaseException:
            if before is not None:
                self._make(GRADIENTS, before.of)  # what was in it is done with after each step
            raise

    def fetch(self, path: str, device: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """See `LayersOnDisk`."""
        at = self._devices[int(device)]
        return self._kept(
            PARAMETERS, path, lambda: self._reader(PARAMETERS, path, at).get(int(layer))
        )

    def left(
        self,
        path: str,
        device: np.ndarray,
        layer: np.ndarray,
        wanted: np.ndarray,
        after: np.ndarray,
    ) -> np.ndarray:
        """See `LayersOnDisk`."""
        del after
        of = self._files[GRADIENTS].of
        if not wanted:
            return np.zeros(of.shapes[path], of.dtype)
        at = self._devices[int(device)]
        return self._kept(
            GRADIENTS, path, lambda: self._reader(GRADIENTS, path, at).get(int(layer))
        )

    def leave(
        self, path: str, device: np.ndarray, layer: np.ndarray, gradient: np.ndarray
    ) -> np.ndarray:
        """See `LayersOnDisk`."""
        at = self._devices[int(device)]
        if (path, at) not in self._files[GRADIENTS].of.writers:
            return _ZERO

        def write() -> np.ndarray:
            pending = self._writes.setdefault((path, at), deque())
            while len(pending) >= WRITTEN_BEHIND:
                pending.popleft()[1].result()
            file = self._files[GRADIENTS]
            buffer = file.buffer(path)
            buffer.array[...] = gradient
            pending.append((int(layer), file.write(path, at, int(layer), buffer)))
            return _ZERO

        return self._kept(GRADIENTS, path, write, _ZERO)

    def gradient(self, path: str, device: Any, layer: int) -> Future[Buffer]:
        """Starts to read a gradient as a device left it."""
        return self._files[GRADIENTS].read(path, device, layer)

    def room(self, path: str) -> Buffer:
        """Memory for a layer of a part of a parameter."""
        return self._files[PARAMETERS].buffer(path)

    def store(self, path: str, device: Any, layer: int, buffer: Buffer) -> Future[Buffer]:
        """Starts to write a layer of the part of a parameter that a device holds."""
        return self._files[PARAMETERS].write(path, device, layer, buffer)

    def result(self, moved: Future[Buffer]) -> Buffer:
        """What was read or written between two programs.

        Raises:
          OffloadError: it was not; all later uses are refused.
        """
        try:
            return moved.result()
        except OffloadError as error:
            self._failed(error)
            raise self._refused(error) from error

    def settle(self) -> None:
        """Between two programs: waits for what is on its way, and gives up what was read ahead.

        Raises:
          OffloadError: something went wrong since the last time, or files are gone; all later uses
            are refused.
        """
        self._whole.check()
        for reader in self._readers.values():
            reader.clear()
        try:
            for pending in self._writes.values():
                while pending:
                    pending.popleft()[1].result()
            for file in self._files.values():
                file.file.check()
        except OffloadError as error:
            self._failed(error)
        if self._failure is not None:
            raise self._refused(self._failure) from self._failure

    def close(self) -> None:
        """Waits for the threads, removes the files and frees the buffers."""
        if self._whole.close():
            self._remove()
            self._readers.clear()
            self._writes.clear()

    def _make(self, name: str, records: StackRecords) -> None:
        made = StackFile(self._folder, name, records, self._pool, self._threads)
        self._files[name] = made
        self._readers = {key: reader for key, reader in self._readers.items() if key[0] != name}
        self._writes.clear()
        _LOGGER.info(
            "%s: %.2f GB reserved, %s.",
            made.file.path,
            made.file.size / 1e9,
            "direct I/O" if made.file.direct else "no direct I/O: through the page cache, emptied",
        )

    def _reader(self, name: str, path: str, device: Any) -> ReadAhead:
        with self._lock:
            key = (name, path, device)
            if key not in self._readers:
                file, is_parameter = self._files[name], name == PARAMETERS

                def read(layer: int) -> Future[Buffer]:
                    if not is_parameter:
                        self._written(path, device, layer)
                    return file.read(path, device, layer)

                self._readers[key] = ReadAhead(
                    read,
                    file.of.layers[path],
                    ahead=self._ahead if is_parameter else 1,
                    turns=is_parameter,
                )
            return self._readers[key]

    def _written(self, path: str, device: Any, layer: int) -> None:
        """Waits until a gradient that was left is in the file."""
        for written, future in list(self._writes.get((path, device), ())):
            if written == layer:
                future.result()

    def _kept(
        self,
        name: str,
        path: str,
        call: Callable[[], np.ndarray],
        otherwise: np.ndarray | None = None,
    ) -> np.ndarray:
        """What a call gives; NaN, or what is said, once anything has gone wrong."""
        if self._failure is None:
            try:
                return call()
            except Exception as error:  # whatever it is: no device may stop
                self._failed(error)
        if otherwise is not None:
            return otherwise
        of = self._files[name].of
        return np.full(of.shapes[path], np.nan, of.dtype)

    def _refused(self, error: OffloadError) -> OffloadError:
        """Refuses further use, and returns what to raise now."""
        self._whole.tear(str(error).removesuffix("."))
        return OffloadError(f"{error} Resume from the last checkpoint, which is as it was.")

    def _failed(self, error: Exception) -> None:
        with self._lock:
            if self._failure is None:
                known = isinstance(error, OffloadError)
                self._failure = error if known else OffloadError(f"{self._folder.path}: {error!r}.")


def _remove(
    folder: ProcessFolder, files: dict[str, StackFile], threads: ThreadPoolExecutor, owner: int
) -> None:
    """Ends the threads, removes the files and gives up the lock; not in a child that was forked."""
    if os.getpid() == owner:
        threads.shutdown(cancel_futures=True)
        for file in files.values():
            file.file.remove()
        folder.close()

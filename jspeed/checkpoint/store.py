"""`CheckpointStore`: checkpoints saved in the background and restored onto any mesh."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspeed.checkpoint import diagnosis, folders
from jspeed.checkpoint.arrays import (
    ArrayWriter,
    describe_arrays,
    read_arrays,
    sharding_of,
    wait_for_processes,
)
from jspeed.checkpoint.background import BackgroundTask
from jspeed.checkpoint.checksums import take_checksums, verify, write_own_checksums
from jspeed.checkpoint.compare import check_like
from jspeed.checkpoint.deferred import Deferred
from jspeed.checkpoint.manifest import (
    MANIFEST_NAME,
    ArrayEntry,
    Manifest,
    json_copy,
    load_manifest,
    verify_files,
)
from jspeed.checkpoint.processes import of_all_processes
from jspeed.core.errors import CheckpointError, DamagedCheckpointError

ARRAYS = "arrays"
FILES = "files"


@dataclass(frozen=True)
class _Pending:
    """What is still to be written once the arrays of a save are on disk."""

    tag: str
    arrays: dict[str, ArrayEntry]
    metadata: dict[str, Any]
    files: dict[str, bytes]
    update_latest: bool


class CheckpointStore:
    """A directory of checkpoints, one folder per tag, and a file `latest` that names one of them.

    A checkpoint holds global logical arrays under stable path names, a JSON object and small files.
    Neither mesh nor sharding is part of it: `restore` puts the arrays wherever `like` says. A save
    becomes visible in one step when it is complete, so a process killed at any moment leaves the
    previous checkpoint as it was.

    With several processes, all of them call `save`, `wait` and `restore` alike, on a directory they
    share; the first one writes the manifest and `latest`.

    Args:
      directory: where the checkpoints are; made by the first save.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).absolute()
        self._task = BackgroundTask()
        self._saving: str | None = None
        self._saves = 0

    def save(
        self,
        tag: str,
        arrays: Mapping[str, jax.Array | Deferred],
        metadata: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        *,
        wait: bool = False,
        update_latest: bool = True,
    ) -> None:
        """Saves a checkpoint; returns when the arrays are copied, and writes in the background.

        First waits for the save before it, if that is still running. The arrays may be donated or
        changed as soon as this returns. An existing checkpoint of the same tag is replaced once the
        new one is complete. A process that ends normally finishes its save first (for the sake of
        this, Python 3.12.0 to 3.12.2 write before returning).

        Args:
          tag: the folder name, such as `global_step100`.
          arrays: path such as `master/blocks/attn/kernel` -> global array of any sharding and dtype
            (PRNG keys as their uint32 key data). Deferred ones are made and written one after the
            other; then this returns only when the checkpoint is on disk.
          metadata: a JSON object; `metadata["step"]` orders checkpoints where the tag ends in no
            number.
          files: file name -> content, for small things such as a tokenizer.
          wait: return only when the checkpoint is on disk.
          update_latest: let `latest` name this checkpoint when it is complete.

        Raises:
          CheckpointError: an argument cannot be saved, the directory cannot be written, or the save
            *before* this one failed (then this one was not started).
        """
        folders.check_tag(tag)
        # Copies, since the caller may change its own while this is being written.
        pending = _Pending(
            tag,
            describe_arrays(arrays),
            json_copy(metadata),
            _check_files(files or {}),
            update_latest,
        )
        self._task.wait()

        writer = ArrayWriter()
        aside = self.directory / (tag + folders.SAVING)
        self._begin(tag)
        try:
            writer.start(aside / ARRAYS, arrays)
        except CheckpointError:
            raise
        except Exception as error:
            self._discard(tag)
            raise self._save_failed(tag, error) from error
        self._saving, self._saves = tag, self._saves + 1
        barrier = f"jspeed_checkpoint_{self._saves}"
        self._task.start(lambda: self._finish(pending, writer, barrier), name=f"save {tag}")
        if wait or any(isinstance(array, Deferred) for array in arrays.values()):
            self.wait()

    def wait(self) -> None:
        """Waits until the running save is on disk and visible.

        Raises:
          CheckpointError: the save failed; earlier checkpoints and `latest` are as they were.
        """
        self._task.wait()

    def latest(self) -> str | None:
        """Returns the tag that `latest` names, or None where nothing was saved.

        Raises:
          CheckpointError: `latest` is damaged, or names a checkpoint that is gone, unfinished or
            foreign.
        """
        tag = folders.read_latest(self.directory)
        if tag is not None:
            self._locate(tag, named_by_latest=True)
        return tag

    def is_empty(self) -> bool:
        """Whether nothing was ever saved here, not even something that is damaged now."""
        return not (self.directory / folders.LATEST_NAME).exists() and not self.tags()

    def make_latest(self, tag: str) -> None:
        """Lets `latest` name a checkpoint that was taken in place of a damaged one."""
        if jax.process_index() == 0:
            folders.write_latest(self.directory, tag)

    def tags(self) -> list[str]:
        """Returns the tags of the complete checkpoints, oldest step first."""
        manifests = []
        for tag in folders.tag_names(self.directory):
            folder = folders.find(self.directory, tag)
            if folder is None:
                continue
            try:
                manifests.append((load_manifest(folder).order, tag))
            except CheckpointError:
                continue
        return [tag for _, tag in sorted(manifests)]

    def metadata(self, tag: str | None = None) -> dict[str, Any]:
        """Returns the JSON object saved with a checkpoint (the latest by default).

        Raises:
          CheckpointError: there is no such checkpoint, or its manifest is damaged.
        """
        return self._open(tag)[1].metadata

    def files(self, tag: str | None = None) -> dict[str, bytes]:
        """Returns the small files saved with a checkpoint (the latest by default), by name.

        Raises:
          CheckpointError: there is no such checkpoint, or files of it are missing or truncated.
        """
        folder, manifest = self._open(tag)
        verify_files(folder, manifest)
        prefix = f"{FILES}/"
        return {
            name.removeprefix(prefix): (folder / name).read_bytes()
            for name in manifest.files
            if name.startswith(prefix)
        }

    def describe(self, tag: str | None = None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns path -> (shape, dtype) of the arrays in a checkpoint (the latest by default).

        Raises:
          CheckpointError: there is no such checkpoint, or its manifest is damaged.
        """
        arrays = self._open(tag)[1].arrays
        return {path: (entry.shape, jnp.dtype(entry.dtype)) for path, entry in arrays.items()}

    def restore(
        self,
        tag: str | None = None,
        *,
        like: Mapping[str, jax.ShapeDtypeStruct],
        subset: bool = False,
        deferred: Collection[str] = (),
    ) -> dict[str, Any]:
        """Returns the arrays of a checkpoint, read straight into the shardings that `like` gives.

        Each device reads only its own part, whatever mesh saved the arrays. A running save is
        waited for.

        Args:
          tag: which checkpoint; the latest by default.
          like: path -> shape, dtype and sharding of each array to read (without a sharding: on one
            device).
          subset: whether the checkpoint may hold more arrays than `like` names.
          deferred: which of them come as `Deferred`, each read when it is made.

        Raises:
          CheckpointError: there is no such checkpoint, it does not hold what `like` expects, or
            files of it are missing, truncated, changed or unreadable.
        """
        self._task.join()
        folder, manifest = self._open(tag)
        check_like(manifest.tag, manifest.arrays, like, subset=subset)
        verify(folder, manifest)

        def read(paths: Collection[str]) -> dict[str, Any]:
            try:
                return read_arrays(
                    folder / ARRAYS, manifest.arrays, {path: like[path] for path in paths}
                )
            except Exception as error:
                raise DamagedCheckpointError(
                    f'Checkpoint "{manifest.tag}" in "{folder}" cannot be read: '
                    f"{diagnosis.reason(error)} Restore another checkpoint, or copy this one again "
                    "from where it came from."
                ) from error

        def later(path: str, leaf: jax.ShapeDtypeStruct) -> Deferred:
            return Deferred(leaf.shape, leaf.dtype, sharding_of(leaf), lambda: read([path])[path])

        now = read([path for path in like if path not in deferred])
        return {path: now[path] if path in now else later(path, like[path]) for path in like}

    def prune(self, keep: int) -> list[str]:
        """Removes the oldest complete checkpoints beyond `keep`, and what killed saves left.

        The checkpoint that `latest` names is never removed; a save that is still running is neither
        counted nor touched.

        Args:
          keep: how many checkpoints stay, at least 1.

        Returns:
          The tags that were removed, oldest first.

        Raises:
          CheckpointError: `keep` is below 1, or a folder cannot be removed.
        """
        if keep < 1:
            raise CheckpointError(f"keep: {keep} checkpoints to keep; expected at least 1.")
        if jax.process_index() != 0:
            return []
        running = self._saving if self._task.running else None
        tags = [tag for tag in self.tags() if tag != running]
        protected = {*tags[-keep:], folders.read_latest(self.directory)}
        removed = [tag for tag in tags if tag not in protected]
        try:
            for tag in removed:
                folders.remove(self.directory, tag)
            for tag in folders.tag_names(self.directory):
                if tag != running:
                    folders.recover(self.directory, tag)
        except OSError as error:
            raise CheckpointError(
                f'Old checkpoints in "{self.directory}" cannot be removed: '
                f"{diagnosis.reason(error)}"
            ) from error
        return removed

    def _begin(self, tag: str) -> None:
        """Makes the folder; if that fails, it does in all processes, or the others would wait."""
        problem: Exception | None = None
        if jax.process_index() == 0:
            try:
                folders.begin(self.directory, tag)
            except Exception as error:
                problem = error
        failed = of_all_processes(int(problem is not None))
        if isinstance(problem, CheckpointError):
            raise problem
        if any(failed):
            error = problem or OSError("the first process could not make the folder")
            self._discard(tag)
            raise self._save_failed(tag, error) from problem

    def _finish(self, pending: _Pending, writer: ArrayWriter, barrier: str) -> None:
        """In the background: waits for the arrays, writes the rest, makes it all visible."""
        aside = self.directory / (pending.tag + folders.SAVING)
        try:
            try:
                writer.finish()
                if jax.process_index() == 0:
                    self._write_files(aside, pending.files)
                write_own_checksums(aside)
            finally:
                wait_for_processes(f"{barrier}_written")
            if jax.process_index() == 0:
                self._publish(aside, pending)
        except Exception as error:
            self._discard(pending.tag)
            raise self._save_failed(pending.tag, error) from error
        finally:
            wait_for_processes(barrier)

    def _write_files(self, aside: Path, files: Mapping[str, bytes]) -> None:
        if files:
            (aside / FILES).mkdir()
        for name, content in files.items():
            folders.write_file(aside / FILES / name, content)

    def _publish(self, aside: Path, pending: _Pending) -> None:
        checksums = take_checksums(aside)
        manifest = Manifest(
            tag=pending.tag,
            saved_at=time.time(),
            arrays=pending.arrays,
            files=folders.measure_files(aside),
            metadata=pending.metadata,
            checksums=checksums,
        )
        folders.write_file(aside / MANIFEST_NAME, manifest.dumps().encode())
        folders.publish(self.directory, pending.tag)
        if pending.update_latest:
            folders.write_latest(self.directory, pending.tag)

    def _discard(self, tag: str) -> None:
        if jax.process_index() == 0:
            folders.discard(self.directory, tag)

    def _save_failed(self, tag: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f'Saving checkpoint "{tag}" in "{self.directory}" failed: {diagnosis.reason(error)} '
            f'Earlier checkpoints and "{folders.LATEST_NAME}" are as they were.'
        )

    def _open(self, tag: str | None) -> tuple[Path, Manifest]:
        """Returns the folder and manifest of a checkpoint, the latest one by default."""
        named_by_latest = tag is None
        if tag is None:
            tag = folders.read_latest(self.directory)
        if tag is None:
            raise diagnosis.missing_checkpoint(self.directory, self.tags())
        folder = self._locate(tag, named_by_latest=named_by_latest)
        return folder, load_manifest(folder)

    def _locate(self, tag: str, *, named_by_latest: bool) -> Path:
        folders.check_tag(tag)
        if tag == self._saving:
            # Its folder is about to be exchanged: look when that is over.
            self._task.join()
        folder = folders.find(self.directory, tag)
        if folder is None:
            raise diagnosis.missing_tag(
                self.directory, tag, self.tags(), named_by_latest=named_by_latest
            )
        return folder


def _check_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    for name, content in files.items():
        if (
            not isinstance(name, str)
            or not name
            or name.startswith(".")
            or set(name) & set("/\\\0")
        ):
            raise CheckpointError(
                f'File name {name!r}: expected a plain name without folders, like "tokenizer.json".'
            )
        if not isinstance(content, bytes):
            raise CheckpointError(
                f'File "{name}": expected bytes, found {type(content).__name__}. Encode text '
                "with .encode() first."
            )
    return dict(files)

"""The half of `Engine` that saves and restores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jspeed.engine.arguments import check_directory
from jspeed.engine.checkpoints import EngineCheckpoints, save_16bit
from jspeed.engine.hf_export import MAX_SHARD_SIZE, ExportDType, export_engine
from jspeed.engine.memory_errors import MemoryErrors
from jspeed.engine.not_in_jspeed import LOAD_CHECKPOINT, SAVE, refuses


class Checkpointing(MemoryErrors):
    """Saves an engine's state and restores it."""

    _store: EngineCheckpoints | None

    @refuses(SAVE)
    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        *,
        files: Mapping[str, bytes] | None = None,
        wait: bool = False,
    ) -> str:
        """Saves everything that resuming needs, in the background; returns the tag.

        Args:
          save_dir: directory of the checkpoints.
          tag: name of this one; `global_step{N}` when None.
          client_state: JSON-able values of one's own, returned by `load_checkpoint`.
          save_latest: point `latest` at this checkpoint once it is complete.
          files: small files to keep beside the arrays.
          wait: return only once the checkpoint is complete on disk.

        Raises:
          CheckpointError: the directory cannot be written, or an earlier save failed.
        """
        check_directory(save_dir, "save_dir")
        return self._checkpoints(save_dir).save(
            self, tag, dict(client_state or {}), save_latest, dict(files or {}), wait
        )

    @refuses(LOAD_CHECKPOINT)
    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Restores a checkpoint saved by any mesh, ZeRO stage or number of processes.

        Args:
          load_dir: directory of the checkpoints.
          tag: which one; the latest when None.
          load_optimizer_states: False keeps the optimizer's state as it is: its moments, and the
            count that corrects their bias.
          load_lr_scheduler_states: False keeps the schedule where it is, which in a new engine is
            its start.
          load_module_only: parameters and mutable collections only; step and optimizer stay as they
            are.

        Returns:
          `(tag, client_state)`.

        Raises:
          CheckpointError: missing, incomplete, damaged, foreign, or of another model; names what is
            wrong.
          OutOfMemoryError: the devices cannot hold it.
        """
        check_directory(load_dir, "load_dir")
        with self.out_of_memory_explained("loading a checkpoint"):
            loaded = self._checkpoints(load_dir).load(
                self,
                tag,
                optimizer=load_optimizer_states and not load_module_only,
                schedule=load_lr_scheduler_states and not load_module_only,
                counters=not load_module_only,
            )
            self.take_state(loaded.state)
        self._counters = loaded.counters
        return loaded.tag, loaded.client_state

    @refuses(SAVE)
    def save_16bit_model(
        self, save_dir: str | os.PathLike[str], save_filename: str = "model.safetensors"
    ) -> str:
        """Writes the whole parameters in the 16-bit compute dtype (bf16 under fp32) for others.

        Gathers one parameter after the other, under any ZeRO stage. Returns the file's path.

        Raises:
          MissingExtraError: safetensors is not installed (extra `hf`).
        """
        check_directory(save_dir, "save_dir")
        return save_16bit(self, save_dir, save_filename)

    def save_hf_model(
        self,
        save_dir: str | os.PathLike[str],
        *,
        dtype: ExportDType | None = None,
        max_shard_size: int = MAX_SHARD_SIZE,
    ) -> None:
        """Writes the parameters in Hugging Face's layout, as `save_pretrained` of transformers:
        config.json, safetensors, and the tokenizer of the folder that the model came from.

        Gathers one parameter after the other, under any ZeRO stage. Of several processes all must
        call it; the first one writes, and all return when the folder is complete.

        Args:
          save_dir: the folder; weights in it are replaced.
          dtype: of the weights; the compute dtype when None.
          max_shard_size: bytes of one file, beyond which there are several and an index.

        Raises:
          ModelError: the model is not of one of jspeed's own families.
          ConfigError: Hugging Face has no such model.
          CheckpointError: the folder cannot be written.
        """
        check_directory(save_dir, "save_dir")
        export_engine(self, save_dir, dtype=dtype, max_shard_size=max_shard_size)

    def wait_for_checkpoint(self) -> None:
        """Waits until the save that is running is complete; raises `CheckpointError` if it
        failed."""
        if self._store is not None:
            self._store.wait()

    def latest_checkpoint(self, load_dir: str | os.PathLike[str]) -> str | None:
        """The tag that `latest` names in a directory, or None where nothing was saved."""
        check_directory(load_dir, "load_dir")
        return self._checkpoints(load_dir).store.latest()

    def prune_checkpoints(self, keep: int) -> None:
        """Removes all but the newest `keep` checkpoints of the directory last saved to."""
        if self._store is not None:
            self._store.store.prune(keep)

    def _checkpoints(self, directory: str | os.PathLike[str]) -> EngineCheckpoints:
        if self._store is None or self._store.directory != os.fspath(directory):
            self.wait_for_checkpoint()
            self._store = EngineCheckpoints(directory)
        return self._store

"""When a run saves, and that a save that fails costs the run only itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jspeed.checkpoint import CheckpointStore
from jspeed.checkpoint.processes import of_all_processes, of_first_process
from jspeed.core.errors import CheckpointError
from jspeed.engine.reporting import LOGGER

if TYPE_CHECKING:
    from jspeed.engine.engine import Engine


class RunCheckpoints:
    """The checkpoints of a run, saved while it goes on.

    Args:
      engine: of the run.
      folder: of all checkpoints.
      keep: the newest so many are kept; None keeps all.
      client_state: gives what is saved beside the engine's state.
      files: to keep with each checkpoint.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        keep: int | None,
        client_state: Callable[[], dict[str, Any]],
        files: dict[str, bytes],
    ) -> None:
        self._engine, self._folder, self._keep = engine, folder, keep
        self._client_state, self._files = client_state, files
        self._unsaved = False
        self._back_at: str | None = None
        self.saved = engine.global_steps if engine.global_steps else -1
        self.seconds = 0.0

    def save(self) -> None:
        """Starts a save; if the one before it has failed, that costs the run only itself."""
        started = time.perf_counter()
        self.settle()
        try:
            self._start()
            self._prune()
        except CheckpointError as error:
            self._not_saved(error)
        self.seconds = time.perf_counter() - started

    def finish(self) -> None:
        """Waits for the last save, and tries once more if it failed: nothing comes after it.

        Raises:
          CheckpointError: it failed again.
        """
        self.settle()
        if self._unsaved:
            self._start()
            self._engine.wait_for_checkpoint()
        self._prune()

    def settle(self) -> None:
        """Waits for the save that is running, and says so if it failed, in whatever process."""
        try:
            self._engine.wait_for_checkpoint()
        except CheckpointError as error:
            self._not_saved(error)
        self._unsaved = any(of_all_processes(int(self._unsaved)))

    def any(self) -> bool:
        """Whether there is a checkpoint, as the first process sees it."""
        return not of_first_process("empty" if self._store().is_empty() else "")

    def roll_back(self) -> str:
        """Takes up the newest whole checkpoint; its tag. Data are read on from where they are.

        If there was none since the last time, the one before it: what is in a checkpoint is only
        seen to be good when the run gets on from it.
        """
        tag, _ = self._engine.load_checkpoint(self._folder, self._before(self._back_at))
        self._store().make_latest(tag)
        self._back_at = tag
        self.saved = self._engine.global_steps
        self._unsaved = False
        return tag

    def _before(self, tag: str | None) -> str | None:
        """The checkpoint before one, or that one if there is none, as the first process sees it;
        None for the newest."""
        if tag is None:
            return None
        tags = self._store().tags()
        position = tags.index(tag) if tag in tags else 0
        return of_first_process(tags[max(0, position - 1)] if tags else tag)

    def _store(self) -> CheckpointStore:
        return CheckpointStore(self._folder)

    def _start(self) -> None:
        self._unsaved = False
        tag = self._engine.save_checkpoint(
            self._folder, client_state=self._client_state(), files=self._files
        )
        self.saved = self._engine.global_steps
        self._back_at = None
        LOGGER.info("step %d: saving checkpoint %s", self.saved, tag)

    def _not_saved(self, error: CheckpointError) -> None:
        self._unsaved = True
        LOGGER.error("%s The run goes on and saves again when it is time.", error)

    def _prune(self) -> None:
        if self._keep is not None:
            self._engine.prune_checkpoints(self._keep)

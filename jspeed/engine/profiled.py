"""What an engine tells of its compiled step: FLOPs by module, and communication."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jspeed.config import CommsLoggerConfig, FlopsProfilerConfig
from jspeed.config.comms_ops import kinds_of
from jspeed.core.errors import JspeedError
from jspeed.engine.accessors import Accessors
from jspeed.engine.reporting import LOGGER
from jspeed.engine.step_program import StepProgram, read_step, shapes_of
from jspeed.profile.collectives import KINDS, Collective
from jspeed.profile.comms_page import comms_list, comms_page, comms_rows
from jspeed.profile.flops_page import FlopsReport, flops_page
from jspeed.profile.peaks import peak_flops
from jspeed.profile.traffic import Traffic
from jspeed.training.state import TrainState


class Profiled(Accessors):
    """The part of an engine that `flops_profiler` and `comms_logger` switch on.

    Attributes:
      say: takes what is printed, in the first process; by default a line of jspeed's logger.
      flops_report: of the step that `flops_profiler` measured; None before.
    """

    say: Callable[[str], None] = staticmethod(LOGGER.info)
    flops_report: FlopsReport | None = None
    place_batch: Any
    _device_step: Any
    _state_to_run: Callable[[], TrainState]
    _seen: tuple[Any, Any] | None = None
    _seen_batch: Any = None
    _steps_seen: int = 0
    _program_read: StepProgram | None = None
    _flops_told: bool = False

    @property
    def is_profiled(self) -> bool:
        """Whether a key asks for either."""
        return self.config.flops_profiler.enabled or self.config.comms_logger.enabled

    def step_program(self) -> StepProgram:
        """The compiled step as the devices run it.

        Raises:
          JspeedError: no batch was seen yet, so nothing is compiled.
        """
        if self._program_read is None:
            if self._seen is None:
                raise JspeedError(
                    "Nothing is compiled yet: the shapes of a batch are not known. Call "
                    "engine.train_batch(batch) first."
                )
            self._program_read = read_step(
                self._device_step,
                *self._seen,
                self.layout,
                self._program.blueprint,
                self.plan.step.gradients.schedule,
            )
        return self._program_read

    def compile_step(self, batch: Any) -> StepProgram:
        """Compiles the step for a batch, without taking it.

        Args:
          batch: as for `train_batch`.
        """
        self._look_at(self._state_to_run(), self.place_batch(batch))
        return self.step_program()

    def _look_at(self, state: TrainState, batch: Any) -> bool:
        """Notes what a step is compiled for; whether that is new."""
        leaves, structure = jax.tree.flatten(batch)
        seen = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if seen == self._seen_batch:
            return False
        self._forget_program()
        self._seen, self._seen_batch = shapes_of((state, batch)), seen
        return True

    def comms_summary(self, *, show: bool = True) -> list[Traffic]:
        """What one device sends and gets in one step, from the program compiled for this backend.

        Args:
          show: prints it as a table too.

        Returns:
          One entry per kind, mesh axes and dtype: `op` (DeepSpeed's name), `kind`, `axis`, `dtype`,
          `count`, `bytes` (whole: before a reduce-scatter, after an all-gather),
          `overlappable_bytes`, and `stage` where stages of a pipeline differ. With
          `comms_logger.prof_all` off only the operations of `prof_ops`.

        Raises:
          JspeedError: no batch was seen yet.
        """
        rows = comms_rows(self.step_program().collectives(), self._kinds())
        if show:
            page = comms_page(
                rows,
                steps=self._steps_seen,
                backend=self.device.platform,
                devices=self.world_size,
            )
            self._tell(page)
        return rows

    log_summary = comms_summary

    def tell_at_end(self) -> None:
        """`comms_summary`, if `comms_logger` asks for it; and what was asked for and never came."""
        flops, comms = self.config.flops_profiler, self.config.comms_logger
        if comms.enabled:
            self._try("comms_logger", self.comms_summary)
        if flops.enabled and not self._flops_told:
            self._flops_told = True
            self._tell(
                f'"flops_profiler.profile_step": engine.train_batch took no step '
                f"{flops.profile_step}, so nothing is profiled."
            )

    def _try(self, key: str, tell: Callable[[], Any]) -> None:
        """Tells something, or why it cannot be told: a diagnosis must not end a run."""
        try:
            tell()
        except JspeedError as error:
            self._tell(f'"{key}": {error}')

    def _forget_program(self) -> None:
        self._seen = self._seen_batch = self._program_read = None
        self._steps_seen = 0

    @contextmanager
    def _profiled(self, step: int, state: TrainState, batch: Any) -> Iterator[None]:
        """Around a step: notes the shapes it is compiled for, and measures it if that is due."""
        flops, comms = self.config.flops_profiler, self.config.comms_logger
        start = self._seen is None
        new = self._look_at(state, batch)
        if start and self.is_profiled:
            self._try("flops_profiler" if flops.enabled else "comms_logger", self.step_program)
            if comms.enabled and comms.verbose:
                self._try("comms_logger", lambda: self._tell(self._comms_list(comms)))
            if flops.enabled and step > flops.profile_step and not self._flops_told:
                self._flops_told = True
                self._tell(
                    f'"flops_profiler.profile_step": {flops.profile_step} was before this start, '
                    f"which begins with step {step}: no step is profiled."
                )
        if not (flops.enabled and step == flops.profile_step and not self._flops_told):
            yield
            self._steps_seen += 1
            return
        self._flops_told = True
        self._try("flops_profiler", self.step_program)  # compiled before the clock starts
        jax.block_until_ready((state, batch))
        began = time.perf_counter()
        yield
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - began
        self._steps_seen += 1
        self._try("flops_profiler", lambda: self._tell_step(step, seconds, first=new))

    def _tell_step(self, step: int, seconds: float, *, first: bool) -> None:
        self.flops_report = self._flops_report(self.step_program(), step, seconds, first=first)
        self._tell_flops(self.flops_report, self.config.flops_profiler)

    def _flops_report(
        self, program: StepProgram, step: int, seconds: float, *, first: bool
    ) -> FlopsReport:
        remarks = (
            ("this was the first step with this batch's shapes; a later one would be warm",)
            if first
            else ()
        )
        kind, dtype = self.device.device_kind, self.layout.compute_dtype
        return FlopsReport(
            program.flops(), step, seconds, kind, dtype, peak_flops(kind, dtype), remarks
        )

    def _tell_flops(self, report: FlopsReport, config: FlopsProfilerConfig) -> None:
        page = flops_page(
            report,
            module_depth=config.module_depth,
            top_modules=config.top_modules,
            detailed=config.detailed,
        )
        if config.output_file is None:
            self._tell(page)
        elif jax.process_index() == 0:
            path = Path(config.output_file)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(page + "\n")
            except OSError as error:
                self._tell(
                    f'"flops_profiler.output_file": "{path}" cannot be written '
                    f"({error.strerror or error}).\n{page}"
                )

    def _comms_list(self, comms: CommsLoggerConfig) -> str:
        program = self.step_program()
        owners = program.owners

        def module(one: Collective) -> str:
            owner = owners.of_name(one.op_name)
            return f"{owner.path} ({owner.phase.value})" if owner.path else owner.phase.value

        return comms_list(
            program.collectives()[0], self._kinds(), module=module if comms.debug else None
        )

    def _kinds(self) -> frozenset[str]:
        comms = self.config.comms_logger
        return frozenset(KINDS) if comms.prof_all else kinds_of(comms.prof_ops)

    def _tell(self, text: str) -> None:
        if jax.process_index() == 0:
            self.say(text)

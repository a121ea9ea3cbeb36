"""A run's first steps under `jax.profiler`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jspeed.config import Config
from jspeed.core.errors import ConfigError, JspeedError
from jspeed.engine.engine import Engine
from jspeed.engine.reporting import heed_log_level
from jspeed.engine.run import make_parts, run_sections
from jspeed.layout.mesh import stages_of
from jspeed.profile.step_flops import StepFlops
from jspeed.profile.step_trace import Reader, StepTrace
from jspeed.profile.trace import WINDOW, find_trace, read_trace


@dataclass(frozen=True)
class ProfiledRun:
    """What was seen of a run's steps.

    Attributes:
      first: step that was traced.
      last: step that was traced.
      trace: where the time went, on the devices of this process.
      flops: of a step on all devices.
      untraced_seconds: of one step before the trace began; None where there was none beside the
        first, which is compiled.
      device_kind: as JAX tells it.
      compute_dtype: of the model's products.
      devices: of the whole run.
      path: of the trace for XProf.
      perfetto: of the trace for Perfetto; None where jax.profiler wrote none.
    """

    first: int
    last: int
    trace: StepTrace
    flops: StepFlops
    untraced_seconds: float | None
    device_kind: str
    compute_dtype: str
    devices: int
    path: Path
    perfetto: Path | None

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "first_step": self.first,
            "last_step": self.last,
            "devices": self.devices,
            "device_kind": self.device_kind,
            "step_seconds": self.trace.seconds / self.trace.steps,
            "untraced_step_seconds": self.untraced_seconds,
            "flops_per_step": self.flops.total,
            "recomputed_flops_per_step": self.flops.recomputed,
            "trace_file": str(self.path),
            "perfetto_file": None if self.perfetto is None else str(self.perfetto),
            **self.trace.to_json(),
        }


def parse_steps(text: str) -> tuple[int, int]:
    """`"3:5"` -> `(3, 5)`, both of which count; `"4"` -> `(4, 4)`.

    Raises:
      ConfigError: it is neither, or ends before it begins.
    """
    first, colon, last = text.partition(":")
    try:
        steps = int(first), int(last if colon else first)
    except ValueError:
        steps = (0, 0)
    if not 1 <= steps[0] <= steps[1]:
        raise ConfigError(
            f'"--steps": {text!r}; expected the first and the last step to trace, as 3:5, or one '
            "step, as 4. Steps count from 1."
        )
    return steps


def profile_run(
    config: Config, *, first: int, last: int, output: Path, say: Callable[[str], None]
) -> ProfiledRun:
    """Trains a run from its beginning and traces some of its steps; nothing is saved.

    Args:
      config: a complete run file.
      first: step to trace.
      last: step to trace.
      output: where the trace goes; of several processes each has a folder in it.
      say: takes lines for people.

    Raises:
      JspeedError: the run cannot be made, or the profiler cannot write.
    """
    run_sections(config)
    heed_log_level(config)
    folder = output / f"process{jax.process_index()}" if jax.process_count() > 1 else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f'"--output": {folder} cannot be made ({error.strerror}). Choose another folder.'
        ) from None
    parts = make_parts(config, say, resume=False)
    engine, batches = parts.engine, parts.batches
    engine.say = say
    batch = next(batches)
    say(f"compiling; then step(s) {first} to {last} are traced into {folder}")
    program = engine.compile_step(batch)
    untraced = _before(engine, batch, batches, first)
    with _tracing(folder), jax.profiler.TraceAnnotation(WINDOW):
        for step in range(first, last + 1):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                engine.train_batch(batch if step == 1 else next(batches))
        jax.block_until_ready(engine.state)
    path = find_trace(folder)
    reader = Reader(program.module, program.owners)
    found = reader.step_trace(
        read_trace(path),
        steps=last - first + 1,
        stages=stages_of(engine.mesh, engine.mesh.local_devices),
        collectives=program.collectives(),
        sizes=engine.layout.sizes,
    )
    engine.tell_at_end()
    perfetto = path.with_name("perfetto_trace.json.gz")
    return ProfiledRun(
        first,
        last,
        found,
        program.flops(),
        untraced,
        engine.device.device_kind,
        engine.layout.compute_dtype,
        engine.world_size,
        path,
        perfetto if perfetto.exists() else None,
    )


def _before(engine: Engine, batch: Any, batches: Any, first: int) -> float | None:
    """Takes the steps before the trace; seconds of one of them, the first left out."""
    began = 0.0
    for step in range(1, first):
        engine.train_batch(batch if step == 1 else next(batches))
        if step == 1:
            jax.block_until_ready(engine.state)
            began = time.perf_counter()
    jax.block_until_ready(engine.state)
    return (time.perf_counter() - began) / (first - 2) if first > 2 else None


@contextmanager
def _tracing(folder: Path) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be an event, and take its time
    try:
        jax.profiler.start_trace(str(folder), create_perfetto_trace=True, profiler_options=options)
    except RuntimeError as error:
        raise JspeedError(f"jax.profiler cannot start: {error}") from error
    try:
        yield
    finally:
        jax.profiler.stop_trace()

"""What the devices did and when, read from a trace of `jax.profiler`.

On the CPU and on NVIDIA GPUs each event of a compiled program carries the name of its instruction
(`hlo_op`) and of its module (`hlo_module`). On the CPU the events of all devices are on the host's
threads, with the device's number beside; a GPU has a plane of its own, with one line per stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from jspeed.core.errors import JspeedError

WINDOW = "jspeed.profile"
"""The annotation on the host around the steps that count."""
_DEVICE = re.compile(r"/device:GPU:(\d+)")
_DERIVED = ("XLA ", "Steps", "Framework ", "Source ", "Async XLA ", "TensorFlow ")
"""Lines of a GPU's plane that repeat what its streams say."""
_END = "end: "


@dataclass(frozen=True)
class TraceEvent:
    """One execution of an instruction, or of a kernel without one.

    Attributes:
      device: its number.
      name: of the instruction; of what has none, of the kernel.
      module: of the compiled program; empty where none is known.
      start: nanoseconds, on the trace's clock.
      end: when it was done.
    """

    device: int
    name: str
    module: str
    start: float
    end: float


@dataclass(frozen=True)
class Trace:
    """A part of a trace.

    Attributes:
      events: of all devices of this process.
      start: of the part, nanoseconds.
      end: of the part.
    """

    events: tuple[TraceEvent, ...]
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


def find_trace(directory: Path) -> Path:
    """The newest trace that `jax.profiler` wrote into a folder.

    Raises:
      JspeedError: there is none.
    """
    found = sorted(directory.glob("plugins/profile/*/*.xplane.pb"))
    if not found:
        raise JspeedError(
            f'"{directory}" holds no trace: jax.profiler wrote no plugins/profile/*/*.xplane.pb '
            "there. Is another profiler attached to this process?"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def read_trace(path: Path) -> Trace:
    """Reads the part of a trace that is annotated with `WINDOW`.

    Args:
      path: of an `.xplane.pb`.

    Raises:
      JspeedError: the file is no trace, or has no such part.
    """
    try:
        data = ProfileData.from_file(str(path))
        planes = list(data.planes)
    except Exception as error:
        raise JspeedError(
            f'"{path}" cannot be read as a trace of jax.profiler ({error}).'
        ) from error
    windows = [
        (event.start_ns, event.end_ns)
        for plane in planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
        if event.name == WINDOW
    ]
    if not windows:
        raise JspeedError(
            f'"{path}" has no event {WINDOW!r}, which marks the steps to look at. Trace with '
            "`jspeed profile`, or put jax.profiler.TraceAnnotation("
            f"{WINDOW!r}) around the steps."
        )
    start, end = min(w[0] for w in windows), max(w[1] for w in windows)
    events: list[TraceEvent] = []
    for plane in planes:
        gpu = _DEVICE.match(plane.name)
        if gpu:
            events += _stream_events(plane, int(gpu.group(1)))
        elif plane.name.startswith("/host:"):
            events += _thread_events(plane)
    inside = (event for event in events if event.end > start and event.start < end)
    return Trace(tuple(inside), start, end)


def _stream_events(plane: Any, device: int) -> Iterator[TraceEvent]:
    """The kernels and copies of a GPU."""
    for line in plane.lines:
        if line.name.startswith(_DERIVED):
            continue
        for event in line.events:
            stats = dict(event.stats)
            name = str(stats.get("hlo_op") or event.name)
            module = str(stats.get("hlo_module") or "")
            yield TraceEvent(device, name, module, event.start_ns, event.end_ns)


def _thread_events(plane: Any) -> Iterator[TraceEvent]:
    """The instructions that the threads of a CPU ran.

    What goes on after the call of an instruction has returned is ended by an event of its own,
    which names the first one.
    """
    begun: list[tuple[Any, TraceEvent]] = []
    ended: dict[Any, float] = {}
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith(_END):
                key = dict(event.stats).get("_c")
                ended[key] = max(event.end_ns, ended.get(key, 0.0))
                continue
            stats = dict(event.stats)
            if "hlo_op" in stats:
                found = TraceEvent(
                    int(stats.get("device_ordinal", 0)),
                    str(stats["hlo_op"]),
                    str(stats.get("hlo_module", "")),
                    event.start_ns,
                    event.end_ns,
                )
                begun.append((stats.get("_p"), found))
    for key, event in begun:
        end = max(event.end, ended.get(key, 0.0)) if key is not None else event.end
        yield TraceEvent(event.device, event.name, event.module, event.start, end)

"""Where the time of traced steps went: by kind of work, by module of the model, by collective."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jspeed.profile.busy import Span, shares
from jspeed.profile.collectives import Collective
from jspeed.profile.comms_page import op_of
from jspeed.profile.hlo import Instruction, Module
from jspeed.profile.kinds import RANKS, Kind, kind_of, kind_of_kernel
from jspeed.profile.owners import Owners, Phase
from jspeed.profile.trace import Trace, TraceEvent
from jspeed.profile.traffic import bus_share

UPDATE, UNNAMED, OTHERS = "update", "elsewhere", "other programs"


@dataclass
class ModuleTime:
    """A module of the model, or a function or part of the step beside its modules.

    Attributes:
      name: the last part of its path; of what is no module, in brackets.
      path: in the model; empty for the whole step.
      seconds: by kind, of everything in it, on one device, mean over the devices.
      children: the longest first.
    """

    name: str
    path: str
    seconds: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(Kind, 0.0))
    children: list[ModuleTime] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds of all kinds."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Itself and all inside, ready for JSON."""
        return {
            "name": self.name,
            "path": self.path,
            "seconds": {kind.name.lower(): value for kind, value in self.seconds.items()},
            "children": [child.to_json() for child in self.children],
        }


@dataclass(frozen=True)
class CollectiveTime:
    """Collectives of one kind over the same axes.

    Attributes:
      op: DeepSpeed's name.
      axis: the mesh axes.
      dtype: on the wire.
      count: of arrays, per step and device.
      bytes: of them, whole.
      seconds: per step that one is on its way, waiting for other devices included; None where the
        trace shows none.
      devices: that take part.
      bus_share: of the bytes, what passes a device's link; see `jspeed.profile.traffic`.
    """

    op: str
    axis: str
    dtype: str
    count: int
    bytes: int
    seconds: float | None
    devices: int
    bus_share: float

    @property
    def algbw(self) -> float | None:
        """Bytes per second of the whole arrays."""
        return self.bytes / self.seconds if self.seconds else None

    @property
    def busbw(self) -> float | None:
        """Bytes per second that pass a device's link."""
        return None if self.algbw is None else self.algbw * self.bus_share

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        names = ("op", "axis", "dtype", "count", "bytes", "seconds", "devices", "algbw", "busbw")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class StepTrace:
    """Where the time of some steps went on one device, mean over this process's devices.

    Attributes:
      seconds: of all of the steps.
      steps: how many.
      devices: of this process.
      step: the tree of modules; its kinds add up to `seconds`, idle included.
      collectives: the longest first.
      unknown: the share of the busy time that is of no instruction of the train step.
    """

    seconds: float
    steps: int
    devices: int
    step: ModuleTime
    collectives: tuple[CollectiveTime, ...]
    unknown: float

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "devices": self.devices,
            "kinds": {kind.name.lower(): value for kind, value in self.step.seconds.items()},
            "modules": self.step.to_json(),
            "collectives": [one.to_json() for one in self.collectives],
            "unknown_share": self.unknown,
        }


class _Work(NamedTuple):
    kind: Kind
    path: str
    part: str


class Reader:
    """Puts the events of a trace to the instructions of a compiled step.

    Args:
      module: of the train step, parsed.
      owners: of its instructions.
    """

    def __init__(self, module: Module, owners: Owners) -> None:
        self._module, self._owners = module, owners
        self._instructions = {
            instruction.name: instruction
            for computation in module.computations.values()
            for instruction in computation.instructions
        }
        self._known: dict[tuple[str, str], _Work | None] = {}

    def step_trace(
        self,
        trace: Trace,
        *,
        steps: int,
        stages: Sequence[int],
        collectives: Sequence[Sequence[Collective]],
        sizes: Mapping[str, int],
    ) -> StepTrace:
        """Sums a trace up.

        Args:
          trace: of whole steps.
          steps: how many.
          stages: of the pipeline, one for each device of this process, idle ones included.
          collectives: of one device in one step, by stage; of stages elsewhere, too.
          sizes: of the mesh axes.
        """
        devices = len(stages)
        local = [collectives[stage] for stage in stages]
        spans: dict[int, list[Span]] = defaultdict(list)
        for event in trace.events:
            work = self.work(event)
            if work is not None:
                spans[event.device].append(Span(event.start, event.end, RANKS[work.kind], work))
        sums: dict[Hashable, float] = defaultdict(float)
        idle = (trace.end - trace.start) * (devices - len(spans))
        for found in spans.values():
            mine, nothing = shares(found, trace.start, trace.end)
            idle += nothing
            for key, time in mine.items():
                sums[key] += time
        scale = 1e-9 / devices
        seconds = {key: time * scale for key, time in sums.items() if isinstance(key, _Work)}
        tree = _tree({**seconds, _Work(Kind.IDLE, "", Kind.IDLE.value): idle * scale})
        busy = sum(seconds.values())
        unknown = sum(time for key, time in seconds.items() if key.part == OTHERS)
        return StepTrace(
            trace.seconds,
            steps,
            devices,
            tree,
            self._collectives(trace, steps, local, sizes),
            unknown / busy if busy else 0.0,
        )

    def work(self, event: TraceEvent) -> _Work | None:
        """What an event is; None of a loop, whose turns have events of their own."""
        key = (event.module, event.name)
        if key not in self._known:
            self._known[key] = self._work(event)
        return self._known[key]

    def _work(self, event: TraceEvent) -> _Work | None:
        instruction = self._own(event)
        if instruction is None:
            return _Work(kind_of_kernel(event.name), "", OTHERS)
        kind = kind_of(self._module, instruction)
        if kind is None:
            return None
        named = self._named(instruction)
        owner = self._owners.of(named)
        if owner.path:
            return _Work(kind, owner.path, "")
        if owner.phase is Phase.UPDATE:
            return _Work(kind, "", UPDATE)
        return _Work(kind, "", owner.function or UNNAMED)

    def _own(self, event: TraceEvent) -> Instruction | None:
        if event.module != self._module.name:
            return None
        return self._instructions.get(event.name)

    def _named(self, instruction: Instruction) -> Instruction:
        """The instruction, or what it computes in the end, if only that has a name."""
        while not instruction.op_name and instruction.opcode == "fusion":
            callee = (instruction.attribute("calls") or "").lstrip("%")
            if callee not in self._module.computations:
                break
            instruction = self._module.computations[callee].root
        return instruction

    def _collectives(
        self,
        trace: Trace,
        steps: int,
        devices: Sequence[Sequence[Collective]],
        sizes: Mapping[str, int],
    ) -> tuple[CollectiveTime, ...]:
        times: dict[str, float] = defaultdict(float)
        for event in trace.events:
            if event.module == self._module.name:
                times[event.name] += (event.end - event.start) * 1e-9 / (steps * len(devices))
        carried: dict[str, float] = defaultdict(float)
        for one in (one for device in devices for one in device):
            carried[one.name] += one.count * one.whole.bytes
        sums: dict[_Group, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for one in (one for device in devices for one in device):
            size = one.count * one.whole.bytes
            # Arrays that XLA combined share the time of one instruction.
            part = size / carried[one.name] if carried[one.name] else 0.0
            entry = sums[_Group(one.kind, one.axes, one.dtype)]
            entry[0] += one.count / len(devices)
            entry[1] += size / len(devices)
            entry[2] += times.get(one.name, 0.0) * part
        rows = [
            _collective_time(group, calls, size, seconds, sizes)
            for group, (calls, size, seconds) in sums.items()
        ]
        return tuple(sorted(rows, key=lambda row: -(row.seconds or 0.0)))


class _Group(NamedTuple):
    kind: str
    axes: tuple[str, ...]
    dtype: str


def _collective_time(
    group: _Group, count: float, size: float, seconds: float, sizes: Mapping[str, int]
) -> CollectiveTime:
    devices = math.prod(sizes.get(axis, 1) for axis in group.axes)
    return CollectiveTime(
        op_of(group.kind),
        "+".join(group.axes),
        group.dtype,
        round(count),
        round(size),
        seconds or None,
        devices,
        bus_share(group.kind, devices),
    )


def _tree(seconds: Mapping[_Work, float]) -> ModuleTime:
    root = ModuleTime("step", "")
    nodes: dict[tuple[str, str], ModuleTime] = {("", ""): root}
    for work, time in seconds.items():
        parts = work.path.split("/") if work.path else []
        parent, line = root, [root]
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[:end])
            if (path, "") not in nodes:
                nodes[path, ""] = ModuleTime(parts[end - 1], path)
                parent.children.append(nodes[path, ""])
            parent = nodes[path, ""]
            line.append(parent)
        if work.part:
            if ("", work.part) not in nodes:
                nodes["", work.part] = ModuleTime(f"({work.part})", "")
                root.children.append(nodes["", work.part])
            line.append(nodes["", work.part])
        for node in line:
            node.seconds[work.kind] += time
    for node in nodes.values():
        node.children.sort(key=lambda child: -child.total)
    return root

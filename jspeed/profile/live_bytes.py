"""What a device holds, by role, from the first instruction of a compiled step to the last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jspeed.layout.explain import Explanation
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Role
from jspeed.profile.compiled import Compiled
from jspeed.profile.memory import (
    GRADIENTS,
    PIPELINE,
    TEMPORARY_ROLES,
    Attribution,
    Buffer,
    Memory,
    gradient_shapes,
)
from jspeed.profile.origins import Origins

PARAMETERS, MASTER, MOMENTS = "parameters", "master weights", "optimizer moments"
OTHER_STATE, BATCH, GAPS = "other state", "batch", "gaps"
STATE_ROLES: dict[Role, str] = {
    Role.PARAM: PARAMETERS,
    Role.MASTER: MASTER,
    Role.MOMENTS: MOMENTS,
}
POINTS = 400
HOLDERS = 20
_NEAR = 50
_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}


@dataclass(frozen=True)
class Point:
    """The worst time of a stretch of the schedule.

    Attributes:
      time: position in the schedule.
      origin: the module of the model and the function that the step is at.
      held: role -> bytes; roles that hold nothing are left out.
    """

    time: int
    origin: str
    held: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """All that is held."""
        return sum(self.held.values())


@dataclass(frozen=True)
class LiveBytes:
    """Live bytes of one device over a step.

    What lives between steps, the batch, and results that take no argument's place are there from
    beginning to end. `gaps` is what the compiler's places lose: most of it holds no value even at
    the peak. The fullest point holds what the step needs in all.

    Attributes:
      length: of the schedule, in instructions; a loop stands in it as one turn, since every turn
        holds the same.
      points: in the order of time; empty where the compiler does not tell.
      holders: the largest buffers at the peak, state among them.
    """

    length: int
    points: tuple[Point, ...]
    holders: tuple[Buffer, ...]

    @property
    def peak(self) -> Point | None:
        """The fullest point, the first of several."""
        return max(self.points, key=lambda point: point.bytes, default=None)

    @property
    def roles(self) -> tuple[str, ...]:
        """Of all points, in the order in which they are drawn."""
        order = (*STATE_ROLES.values(), OTHER_STATE, BATCH, *TEMPORARY_ROLES, PIPELINE, GAPS)
        return tuple(role for role in order if any(role in point.held for point in self.points))

    def to_json(self) -> dict[str, Any]:
        roles, peak = self.roles, self.peak
        return {
            "instructions": self.length,
            "roles": list(roles),
            "peak_at": None if peak is None else peak.time,
            "points": [
                {
                    "at": point.time,
                    "origin": point.origin,
                    "bytes": [point.held.get(role, 0) for role in roles],
                }
                for point in self.points
            ],
            "holders": [buffer.to_json() for buffer in self.holders],
        }


def live_bytes(
    compiled: Compiled,
    state: Explanation,
    memory: Memory,
    origins: Origins,
    *,
    points: int = POINTS,
) -> LiveBytes:
    """Follows what a device holds through a compiled step.

    Args:
      compiled: the step.
      state: where the training state lives.
      memory: of the step, as `account` says.
      origins: of its instructions.
      points: at most so many, each the worst of its stretch of the schedule.
    """
    temporaries = compiled.temporaries
    attribution = Attribution(compiled, origins, gradient_shapes(state))
    most = temporaries.peak[1]
    of_peak = _by_role(attribution.of(compiled.live))
    # Gradients that leave as results are in no place of the temporaries.
    leaving = memory.at_peak.get(GRADIENTS, 0) - of_peak.get(GRADIENTS, 0)
    always = {
        PARAMETERS: memory.parameters,
        MASTER: memory.master,
        MOMENTS: memory.moments,
        OTHER_STATE: memory.other_state,
        BATCH: memory.batch,
    }
    places = _Places(compiled, origins)
    found = []
    for time, held in temporaries.worst_of(points):
        roles = _by_role(attribution.of(temporaries.values_at(time)))
        roles[GRADIENTS] = roles.get(GRADIENTS, 0) + leaving
        named = sum(always.values()) + sum(roles.values())
        roles[GAPS] = memory.peak - most + held - named
        kept = {role: size for role, size in (always | roles).items() if size}
        found.append(Point(time, places.at(time), kept))
    at_peak = [*state_buffers(state), *attribution.of(compiled.live)]
    largest = sorted(at_peak, key=lambda buffer: -buffer.bytes)[:HOLDERS]
    return LiveBytes(len(temporaries.schedule), tuple(found), tuple(largest))


def state_buffers(state: Explanation) -> list[Buffer]:
    """What one device holds of each parameter and role, several arrays of a role in one entry."""
    found = []
    for leaf in state.leaves:
        for role, share in leaf.shares.items():
            if not share.bytes_per_device:
                continue
            ways = [math.prod(state.sizes[axis] for axis in axes_of(entry)) for entry in share.spec]
            ways += [1] * (len(leaf.shape) - len(ways))
            shape = [size // way for size, way in zip(leaf.shape, ways, strict=False)]
            dtype = "+".join(_DTYPES.get(name, name) for name in share.dtype.split("+"))
            times = f"{share.arrays} x " if share.arrays > 1 else ""
            written = f"{times}{dtype}[{','.join(map(str, shape))}]"
            found.append(Buffer(share.bytes_per_device, STATE_ROLES[role], written, leaf.path))
    return found


def _by_role(buffers: Iterable[Buffer]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for buffer in buffers:
        totals[buffer.role] = totals.get(buffer.role, 0) + buffer.bytes
    return totals


class _Places:
    """Where in the model the step is."""

    def __init__(self, compiled: Compiled, origins: Origins) -> None:
        self._schedule = compiled.temporaries.schedule
        self._origins = origins
        self._instructions = {
            instruction.name: instruction
            for computation in compiled.module.computations.values()
            for instruction in computation.instructions
        }

    def at(self, time: int) -> str:
        """The module and function of the last instruction up to a time that tells; empty where none
        near does."""
        for name in reversed(self._schedule[max(0, time - _NEAR) : time + 1]):
            instruction = self._instructions.get(name)
            if instruction is not None and (told := self._origins.of(instruction)):
                return told
        return ""

"""What a device holds while a step runs: the state by role, and what is alive at the peak."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.layout.explain import Explanation, LeafExplanation
from jspeed.layout.mesh import ZERO_AXES
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Role
from jspeed.pipeline.executor import SCOPE
from jspeed.profile.buffers import LiveValue
from jspeed.profile.compiled import Compiled
from jspeed.profile.costs import is_library_product
from jspeed.profile.hlo import ArrayType, Instruction, array_types
from jspeed.profile.origins import Origins
from jspeed.profile.sources import Sources

GRADIENTS, WEIGHTS = "gradients", "gathered weights"
ACTIVATIONS, OTHER = "activations", "other temporaries"
TEMPORARY_ROLES: tuple[str, ...] = (GRADIENTS, WEIGHTS, ACTIVATIONS, OTHER)
WORKSPACE = "workspace of a matrix product"
PIPELINE = "pipeline buffers"
"""The role of what stages keep between turns, in plans of pipelines only."""
_KEPT = {
    "activation": "inputs of stages that wait for their forward",
    "gradient": "gradients of outputs that wait for their backward",
    "kept": "activations kept from forward to backward",
    "taps": "gradients kept for the weights' backward",
    "output": "outputs of the last stage that wait for the head",
}
_LARGEST = 12
_GATHERED = re.compile(r"\b(?:gather|fetch)\.([\w.\-]+)")
_GATHER = re.compile(r"\b(?:gather|fetch)\.|\ball_gather\b")
_PUT = re.compile(rf"{re.escape(SCOPE)}({'|'.join(_KEPT)})\b")
_REDUCE = re.compile(r"\breduce_scatter\b|\bpsum\b|\bgradient_sums\b|\bleave\.")


@dataclass(frozen=True)
class Buffer:
    """One of the buffers that are alive at the peak.

    Attributes:
      bytes: on one device.
      role: one of `TEMPORARY_ROLES`, or `PIPELINE`.
      type: of the array, as `bf16[8,2,512,2048]`.
      origin: the module of the model and the function that made it.
    """

    bytes: int
    role: str
    type: str
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "role": self.role, "type": self.type, "origin": self.origin}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters: stored in the compute dtype.
      master: the fp32 parameters.
      moments: of the optimizer.
      other_state: counters, random keys, running statistics.
      batch: of a step.
      temporaries: what the step allocates beside state and batch.
      at_peak: role -> bytes of temporaries that are alive when most is; what is left of
        `temporaries` are gaps between buffers that are alive at other times.
      largest: of the temporaries alive at the peak.
      peak: what the step needs in all.
      limit: what the device has for it.
      host: in the host's memory or on its disk, for one device.
    """

    parameters: int
    master: int
    moments: int
    other_state: int
    batch: int
    temporaries: int
    at_peak: Mapping[str, int]
    largest: tuple[Buffer, ...]
    peak: int
    limit: int
    host: int

    @property
    def state(self) -> int:
        """All that lives between steps."""
        return self.parameters + self.master + self.moments + self.other_state

    @property
    def headroom(self) -> int:
        """What is left; negative where the run does not fit."""
        return self.limit - self.peak

    def to_json(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "parameters": self.parameters,
            "master": self.master,
            "moments": self.moments,
            "other_state": self.other_state,
            "batch": self.batch,
            "temporaries": self.temporaries,
            "at_peak": {role.replace(" ", "_"): size for role, size in self.at_peak.items()},
            "peak_bytes": self.peak,
            "limit_bytes": self.limit,
            "headroom_bytes": self.headroom,
            "host_bytes": self.host,
            "largest": [buffer.to_json() for buffer in self.largest],
        }


def account(
    compiled: Compiled,
    state: Explanation,
    *,
    batch_bytes: int,
    limit: int,
    origins: Origins,
    host: int = 0,
    leaving: int = 0,
) -> Memory:
    """Puts together what a compiled step holds.

    Args:
      compiled: the step.
      state: where the training state lives.
      batch_bytes: of a step's batch on one device.
      limit: what the device has.
      origins: of the step's instructions.
      host: bytes on the host that the compiled step knows nothing of.
      leaving: bytes of the gradients that the step gives to the host.
    """
    buffers = Attribution(compiled, origins, gradient_shapes(state)).of(compiled.live)
    totals: dict[str, int] = dict.fromkeys(TEMPORARY_ROLES, 0)
    for buffer in buffers:
        totals[buffer.role] = totals.get(buffer.role, 0) + buffer.bytes
    temporaries = compiled.peak_bytes - compiled.argument_bytes
    # Results that take no argument's place are alive to the end, and are among no temporaries.
    totals[GRADIENTS] += min(leaving, max(0, temporaries - sum(totals.values())))
    return Memory(
        parameters=state.role_bytes(Role.PARAM),
        master=state.role_bytes(Role.MASTER),
        moments=state.role_bytes(Role.MOMENTS),
        other_state=sum(state.other_bytes.values()),
        batch=batch_bytes,
        temporaries=temporaries,
        at_peak=totals if buffers else {},
        largest=tuple(buffers[:_LARGEST]),
        peak=compiled.peak_bytes,
        limit=limit,
        host=compiled.host_bytes + host,
    )


def gradient_shapes(state: Explanation) -> dict[tuple[int, ...], tuple[str, ...]]:
    """The shapes that gradients have on a device (of whole parameters, of their parts, and of one
    layer of those that stack layers) and the parameters whose gradients have them."""
    shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for leaf in state.leaves:
        part = _split(leaf, state.sizes)
        # What stages and tensor shards have of it, before ZeRO splits it.
        local = _split(leaf, {a: size for a, size in state.sizes.items() if a not in ZERO_AXES})
        # A table that is also the head has its gradient as the head: transposed.
        shapes_of = (leaf.shape, leaf.shape[1:], leaf.shape[::-1])
        for shape in {*shapes_of, part, part[1:], local, local[1:]}:
            if math.prod(shape) > 1:
                shapes[shape].append(leaf.path)
    return {shape: tuple(paths) for shape, paths in shapes.items()}


def _split(leaf: LeafExplanation, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that is left of a parameter when its home's spec splits it over some axes."""
    ways = [math.prod(sizes.get(axis, 1) for axis in axes_of(entry)) for entry in leaf.home.spec]
    ways += [1] * (len(leaf.shape) - len(ways))
    return tuple(size // way for size, way in zip(leaf.shape, ways, strict=True))


class Attribution:
    """Tells what the temporary values of a compiled step are.

    Args:
      compiled: the step.
      origins: of its instructions.
      gradients: the shapes that gradients have, with the parameters. An array of such a shape
        counts as a gradient if it is fp32 or from the backward pass.
    """

    def __init__(
        self,
        compiled: Compiled,
        origins: Origins,
        gradients: Mapping[tuple[int, ...], tuple[str, ...]] | None = None,
    ) -> None:
        self._sources = Sources(compiled.module)
        self._origins = origins
        self._gradients = gradients or {}
        self._known: dict[LiveValue, Buffer] = {}

    def of(self, values: Iterable[LiveValue]) -> list[Buffer]:
        """The buffers that values are, in the same order."""
        return [self.buffer(value) for value in values]

    def buffer(self, value: LiveValue) -> Buffer:
        """The buffer that a value is."""
        if value not in self._known:
            array = next(iter(array_types(value.type)), None)
            written = f"{array.dtype}[{','.join(map(str, array.shape))}]" if array else "?"
            role, origin = self._told(value, array)
            self._known[value] = Buffer(value.bytes, role, written, origin)
        return self._known[value]

    def _told(self, value: LiveValue, array: ArrayType | None) -> tuple[str, str]:
        """Role and origin."""
        instruction = self._sources.instruction(value.name, array)
        if instruction is None:
            return OTHER, ""
        if is_library_product(instruction) and value.index and value.index[0] > 0:
            return OTHER, WORKSPACE
        waiting = _waiting(self._sources.put(instruction, value.index), array)
        if waiting:
            return PIPELINE, waiting
        source = self._sources.of(instruction, value.index)
        paths = self._gradients.get(array.shape, ()) if array else ()
        role = _role(instruction, source, array, paths)
        named = _parameter(role, instruction, source, paths)
        return role, named or self._origins.of(source)


def _waiting(put: Instruction, array: ArrayType | None) -> str:
    """What of a pipeline waits in a buffer, in words; empty for one that is none of its buffers."""
    field = _PUT.search(put.op_name)
    if field is None or array is None or not array.shape:
        return ""
    return f"{_KEPT[field.group(1)]}, {array.shape[0]} slot(s)"


def _role(
    instruction: Instruction,
    source: Instruction,
    array: ArrayType | None,
    paths: Sequence[str],
) -> str:
    """What a temporary is; `paths` are the parameters of its shape."""
    for one in (instruction, source):
        name, opcode = one.op_name, one.opcode
        if opcode.startswith("all-gather") or _GATHER.search(name):
            return WEIGHTS
        if opcode.startswith(("reduce-scatter", "all-reduce")) or _REDUCE.search(name):
            return GRADIENTS
    backward = any("transpose(" in one.op_name for one in (source, instruction))
    if paths and array is not None and (array.dtype == "f32" or backward):
        return GRADIENTS
    if backward or not any("jvp(" in one.op_name for one in (source, instruction)):
        return OTHER
    return ACTIVATIONS


def _parameter(
    role: str, instruction: Instruction, source: Instruction, paths: Sequence[str]
) -> str:
    """The parameter that a weight or gradient belongs to, as far as known."""
    if role is WEIGHTS:
        for one in (instruction, source):
            found = _GATHERED.search(one.op_name)
            if found:
                return found.group(1).replace(".", "/")
    if role is GRADIENTS and paths:
        return " or ".join(paths)
    return ""

"""A device's memory that did not do, as one error: what was asked for, who holds what, and which
changes of this run help most."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from jspeed.core.errors import OutOfMemoryError
from jspeed.core.units import bytes_text
from jspeed.engine.relief import Given, Relief, reliefs
from jspeed.engine.state_explanation import explain_plan
from jspeed.layout.explain import Explanation
from jspeed.offload.capacity import host_memory
from jspeed.profile.compiled import Compiled
from jspeed.profile.exhausted import HOST_LIMIT, Shortage, read_shortage
from jspeed.profile.live_bytes import OTHER_STATE, STATE_ROLES
from jspeed.profile.memory import (
    ACTIVATIONS,
    OTHER,
    WORKSPACE,
    Attribution,
    Buffer,
    gradient_shapes,
)
from jspeed.profile.origins import Origins, module_classes

LOGGER = logging.getLogger("jspeed")
LARGEST, CHANGES = 6, 3
COMPILE_ROOM = 2**30
"""Free memory of the host without which nothing is compiled to see who holds what."""
WITHOUT_DEVICE: Mapping[str, Any] = {"xla_gpu_autotune_level": 0}
"""For that compile: trying kernels out would need memory of the device, which has none."""

Compile = Callable[[], Compiled]


@dataclass(frozen=True)
class Work:
    """What an engine is at when memory runs out.

    Attributes:
      name: as `running the training step`.
      compile: compiles its program once more, with reports; None for what has no single program.
      sequence: length of the sequences of its batch, where the model reads any.
      rows: of the batch of an evaluation, which differentiates nothing; None for the step.
    """

    name: str
    compile: Compile | None = None
    sequence: int | None = None
    rows: int | None = None


@contextmanager
def out_of_memory_explained(given: Callable[[], Given], work: Callable[[], Work]) -> Iterator[None]:
    """Turns what JAX raises for lack of a device's memory into an `OutOfMemoryError`; the original
    is its cause, and other errors pass.

    Args:
      given: the run as it is; asked only then.
      work: what is done in the block; asked only then.

    Raises:
      OutOfMemoryError: who holds what, and what would help.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        shortage = read_shortage(error)
        if shortage is None:
            raise
        raise OutOfMemoryError(_described(shortage, given, work)) from error


def _described(shortage: Shortage, given: Callable[[], Given], work: Callable[[], Work]) -> str:
    """The text of the error: what could be found out, since nothing may hide that memory ran
    out."""
    try:
        return describe(shortage, given(), work())
    except Exception as failed:
        LOGGER.warning(
            "who holds the memory was not found out: %s: %s", type(failed).__name__, failed
        )
        return f"Out of memory: {_asked(shortage)}.\nXLA said: {shortage.text}"


def describe(shortage: Shortage, given: Given, work: Work) -> str:
    """The text of the error, in several lines."""
    mesh = given.plan.layout.mesh
    assert isinstance(mesh, Mesh), "out of memory on devices that are not there"
    device = mesh.local_mesh.devices.flat[0]
    state = explain_plan(given.program, given.plan)
    if shortage.on_host:
        return "\n".join(_of_host(shortage, state, work))
    # What a compiler has refused it would refuse again.
    compiled = None if shortage.in_compiler else _compiled(work)
    buffers = [] if compiled is None else _buffers(compiled, state, given, work)
    changes = reliefs(
        given,
        buffers if compiled is not None else _guessed(shortage, state, work),
        platform=device.platform,
        sequence=work.sequence,
        rows=work.rows,
        missing=_missing(shortage, device),
    )
    lines = [
        f"Out of memory while {_doing(shortage, work)}: {_asked(shortage)}; {_has(device)}.",
        *_holders(state, compiled, buffers),
        *_advice(changes, _missing(shortage, device)),
        f"XLA said: {shortage.text}",
    ]
    return "\n".join(lines)


def _of_host(shortage: Shortage, state: Explanation, work: Work) -> Iterator[str]:
    """The text where it is the pool of pinned host memory that did not do: nothing that takes less
    of a device helps it."""
    yield (
        f"Out of memory while {work.name}: {_asked(shortage)} of the pinned host memory that XLA "
        "has for transfers and for what is offloaded; it is the host's memory, not a device's."
    )
    if state.host_bytes:
        yield (
            f"The training state holds {bytes_text(state.host_bytes)} of the host's memory or disk "
            "for each device."
        )
    limit = os.environ.get(HOST_LIMIT)
    now = f"{limit} now" if limit else "not set now, so 64"
    rooms = host_memory()
    free = (
        f" This process can have {bytes_text(rooms[0].free)} more ({rooms[0].source})."
        if rooms
        else ""
    )
    yield (
        f"Set the environment variable {HOST_LIMIT} ({now}) to more GB before the run starts, as "
        f"far as the host has them, or offload less.{free}"
    )
    yield f"XLA said: {shortage.text}"


def _doing(shortage: Shortage, work: Work) -> str:
    return work.name.replace("running", "compiling") if shortage.in_compiler else work.name


def _asked(shortage: Shortage) -> str:
    if shortage.needed is not None:
        return f"XLA counts {bytes_text(shortage.needed)} and has {bytes_text(shortage.limit or 0)}"
    if shortage.asked is not None:
        return f"{bytes_text(shortage.asked)} in one piece could not be had"
    return "a piece could not be had"


def _has(device: Any) -> str:
    """What a device has, as far as it tells."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        used = stats.get("bytes_in_use", 0)
        return (
            f"each device ({device.device_kind}) has {bytes_text(stats['bytes_limit'])} for XLA, "
            f"of which {bytes_text(used)} are in use"
        )
    rooms = host_memory() if device.platform == "cpu" else []
    if rooms:
        return (
            f"this process can have {bytes_text(rooms[0].free) if rooms[0].free else 'nothing'} "
            f"more of the host's memory ({rooms[0].source})"
        )
    return "the device does not tell what it has"


def _missing(shortage: Shortage, device: Any) -> int | None:
    """Bytes that one device lacks, where that is known."""
    if shortage.needed is not None and shortage.limit is not None:
        return shortage.needed - shortage.limit
    stats = device.memory_stats() or {}
    if shortage.asked is None or "bytes_limit" not in stats:
        return None
    return max(0, shortage.asked - stats["bytes_limit"] + stats.get("bytes_in_use", 0))


def _compiled(work: Work) -> Compiled | None:
    """The program of the work, or None where compiling it once more is not safe.

    Processes that compile together would wait for those that do not; a compiler without memory
    ends the process.
    """
    rooms = host_memory()
    if work.compile is None or jax.process_count() > 1:
        return None
    if rooms and rooms[0].free < COMPILE_ROOM:
        return None
    LOGGER.warning("out of memory; compiling once more to see who holds what")
    try:
        return work.compile()
    except Exception as error:  # the error that came first is the one to tell
        LOGGER.warning("that failed as well: %s", error)
        return None


def _buffers(compiled: Compiled, state: Explanation, given: Given, work: Work) -> list[Buffer]:
    origins = Origins(compiled.text, module_classes(given.program.blueprint))
    if work.rows is None:
        return Attribution(compiled, origins, gradient_shapes(state)).of(compiled.live)
    found = Attribution(compiled, origins).of(compiled.live)
    return [
        replace(one, role=ACTIVATIONS) if one.role == OTHER and one.origin != WORKSPACE else one
        for one in found
    ]


def _guessed(shortage: Shortage, state: Explanation, work: Work) -> list[Buffer]:
    """What a program that was not compiled here holds beside the state, as one buffer: XLA asks for
    its temporaries in one piece."""
    if work.compile is None:
        return []
    if shortage.needed is None:
        size = shortage.asked or 0
    else:
        size = max(0, shortage.needed - state.total_bytes)
    return [Buffer(size, ACTIVATIONS, "", "")]


def _holders(
    state: Explanation, compiled: Compiled | None, buffers: Sequence[Buffer]
) -> Iterator[str]:
    by_role = {name: state.role_bytes(role) for role, name in STATE_ROLES.items()}
    by_role[OTHER_STATE] = sum(state.other_bytes.values())
    yield f"The training state holds {bytes_text(sum(by_role.values()))} of each device" + _split(
        by_role
    )
    if compiled is None:
        yield "What a program holds beside it was not compiled here; jspeed plan tells."
        return
    temporaries = compiled.peak_bytes - compiled.argument_bytes
    totals: dict[str, int] = {}
    for buffer in buffers:
        totals[buffer.role] = totals.get(buffer.role, 0) + buffer.bytes
    yield f"The program needs {bytes_text(temporaries)} beside it" + _split(totals)
    for buffer in buffers[:LARGEST]:
        yield f"  {bytes_text(buffer.bytes):>10}  {buffer.role}  {buffer.type}  {buffer.origin}"


def _split(by_role: Mapping[str, int]) -> str:
    largest = sorted(by_role.items(), key=lambda item: -item[1])
    parts = [f"{role} {bytes_text(size)}" for role, size in largest if size]
    return f": {', '.join(parts)}." if parts else "."


def _advice(changes: Sequence[Relief], missing: int | None) -> Iterator[str]:
    if not changes:
        yield "No single key of this run is known to help; use more devices, or a smaller model."
        return
    lack = f"; {bytes_text(missing)} are missing" if missing else ""
    yield f"What would take less of each device, each alone and estimated{lack}:"
    for change in changes[:CHANGES]:
        yield f"  {bytes_text(change.saves):>10} less  {change}"
    if missing and changes[0].saves < missing:
        yield "None of these is enough alone: take several, or more devices."

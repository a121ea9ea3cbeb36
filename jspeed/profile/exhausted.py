"""What XLA says when a device's memory does not do, or the pinned host memory that it takes for a
device."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax

_MEMORY = re.compile(
    r"out of memory|ran out of memory|failed to allocate|OUT_OF_MEMORY|exceeds the base limit|"
    r"could not allocate pinned host memory",
    re.IGNORECASE,
)
HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""The environment variable that limits XLA's pool of pinned host memory, in GB."""
_ON_HOST = re.compile(rf"{HOST_LIMIT}|pinned host", re.IGNORECASE)
_SIZE = r"([\d.]+) ?([KMGTP]?)(?:iB|B| bytes)?"
# In the order of trust: exact bytes before what is rounded for people.
_ASKED = (
    re.compile(r"request for [^(]*\((\d+)()B\)"),
    re.compile(r"allocat(?:e|ing) [^(]*\((\d+)() bytes\)"),
    re.compile(r"allocat(?:e|ing) (?:a )?(\d+)()[ -]bytes?"),
    re.compile(r"pinned host memory of size:? (\d+)()"),
    re.compile(rf"allocat(?:e|ing) {_SIZE}\b"),
)
_COMPILED = re.compile(rf"Used {_SIZE} of {_SIZE} \w+")
_ARGUMENTS = re.compile(r"input/output arguments \((\d+)()\) exceeds the base limit \((\d+)()\)")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


@dataclass(frozen=True)
class Shortage:
    """Memory that did not do.

    Attributes:
      text: the first line of what XLA said.
      asked: bytes of the allocation that failed; None where it is not said.
      needed: bytes that a whole program needs, where the compiler refused it.
      limit: bytes that the compiler had for it.
      on_host: whether it is the pool of pinned host memory, and not the device's own memory.
    """

    text: str
    asked: int | None = None
    needed: int | None = None
    limit: int | None = None
    on_host: bool = False

    @property
    def in_compiler(self) -> bool:
        """Whether nothing has run yet."""
        return self.needed is not None


def read_shortage(error: BaseException) -> Shortage | None:
    """What an error says of memory that ran out; None for an error of another kind.

    XLA reports other things as exhausted too, such as a kernel's shared memory or the size of a
    message; those are none.

    Args:
      error: as JAX raised it, of an allocation or of the compiler.
    """
    text = str(error).strip()
    if not isinstance(error, jax.errors.JaxRuntimeError) or not _MEMORY.search(text):
        return None
    first = text.splitlines()[0]
    for pattern in (_COMPILED, _ARGUMENTS):
        if found := pattern.search(text):
            used, used_unit, limit, limit_unit = found.groups()
            return Shortage(first, None, _bytes(used, used_unit), _bytes(limit, limit_unit))
    on_host = bool(_ON_HOST.search(first))
    for pattern in _ASKED:
        if found := pattern.search(text):
            return Shortage(first, _bytes(*found.groups()), on_host=on_host)
    return Shortage(first, on_host=on_host)


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** _POWERS[unit])

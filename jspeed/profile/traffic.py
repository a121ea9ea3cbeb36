"""What a program communicates, summed by kind of collective, mesh axes and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jspeed.profile.collectives import Collective

Traffic = Mapping[str, Any]
"""One sum: `kind`, `axis`, `dtype`, `count`, and `bytes` of all of them, whole."""


def summarise(collectives: Sequence[Collective]) -> tuple[Traffic, ...]:
    """One entry per kind, axes and dtype: how often, and the bytes of all of them, whole."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in collectives:
        if not one.axes:  # every device is on its own
            continue
        key = (one.kind, "+".join(one.axes), one.dtype)
        entry = found.setdefault(
            key,
            {
                "kind": one.kind,
                "axis": key[1],
                "dtype": one.dtype,
                "count": 0,
                "bytes": 0,
                "overlappable_bytes": 0,
            },
        )
        entry["count"] += one.count
        entry["bytes"] += one.count * one.whole.bytes
        if one.asynchronous:
            entry["overlappable_bytes"] += one.count * one.whole.bytes
    return tuple(sorted(found.values(), key=lambda entry: -entry["bytes"]))


def bus_share(kind: str, devices: int) -> float:
    """The bytes that pass one device's link, of those that a collective carries, where it is done
    as a ring: what makes bandwidths of different collectives comparable (NVIDIA's nccl-tests,
    PERFORMANCE.md).

    Args:
      kind: of `jspeed.profile.collectives.KINDS`.
      devices: that take part.
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    share = (devices - 1) / devices
    return 2 * share if kind == "all-reduce" else share

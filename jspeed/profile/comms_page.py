"""What a step communicates, as text, under DeepSpeed's names of operations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jspeed.config.comms_ops import OPS_OF_KIND
from jspeed.profile.collectives import KINDS, Collective
from jspeed.profile.flops_page import columns
from jspeed.profile.traffic import Traffic, summarise

_HEAD = ["operation", "axes", "dtype", "calls per step", "bytes per step", "bytes per call"]


def comms_rows(
    stages: Sequence[Sequence[Collective]], kinds: Collection[str] = KINDS
) -> list[Traffic]:
    """What one device does in one step; stages of a pipeline that differ have rows of their own.

    Args:
      stages: of `StepProgram.collectives`.
      kinds: of collectives, to be told of.

    Returns:
      Per kind, axes and dtype: `op` (DeepSpeed's name), `kind`, `axis`, `dtype`, `count`, `bytes`
      (whole: before a reduce-scatter, after an all-gather), and `stage` (None: all stages).
    """
    sums = [summarise([one for one in stage if one.kind in kinds]) for stage in stages]
    if all(found == sums[0] for found in sums):
        return [_row(entry, None) for entry in sums[0]]
    return [_row(entry, stage) for stage, found in enumerate(sums) for entry in found]


def comms_page(rows: Sequence[Traffic], *, steps: int, backend: str, devices: int) -> str:
    """Rows as text.

    Args:
      rows: of `comms_rows`.
      steps: that ran so far, for the totals.
      backend: whose compiler made the program.
      devices: that run it.
    """
    title = f"communication of one device per step, of {devices}, in the program compiled for "
    lines = [f"{title}{backend}"]
    if not rows:
        return "\n".join([*lines, "  none"])
    staged = any(row["stage"] is not None for row in rows)
    table = [[*_HEAD, *(["stage"] if staged else [])]]
    for row in rows:
        cells = [
            row["op"],
            row["axis"],
            row["dtype"],
            f"{row['count']:,}",
            bytes_text(row["bytes"]),
            bytes_text(row["bytes"] / row["count"]),
        ]
        table.append([*cells, *([str(row["stage"])] if staged else [])])
    if not staged:
        total = sum(row["bytes"] for row in rows)
        after = f"{steps:,} step(s) so far: {bytes_text(total * steps)}"
        lines.append(f"{bytes_text(total)} per step; {after}")
    return "\n".join([*lines, *columns(table)])


def comms_list(
    collectives: Sequence[Collective],
    kinds: Collection[str] = KINDS,
    *,
    module: Callable[[Collective], str] | None = None,
) -> str:
    """Every array that travels, as text.

    Args:
      collectives: of one device.
      kinds: to be told of.
      module: of the model that a collective is of; given, it and the instruction are shown.
    """
    return "\n".join(_lines(collectives, kinds, module))


def op_of(kind: str) -> str:
    """DeepSpeed's usual name of a collective."""
    return OPS_OF_KIND[kind][0]


def bytes_text(count: float) -> str:
    """`1536` -> `"1.50 KiB"`."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _row(entry: Traffic, stage: int | None) -> dict[str, Any]:
    return {"op": op_of(entry["kind"]), **entry, "stage": stage}


def _lines(
    collectives: Sequence[Collective],
    kinds: Collection[str],
    module: Callable[[Collective], str] | None,
) -> Iterator[str]:
    for one in collectives:
        if one.kind not in kinds:
            continue
        whole = one.whole
        shape = f"{whole.dtype}[{','.join(map(str, whole.shape))}]"
        line = (
            f"{op_of(one.kind)} over {'+'.join(one.axes)}: {shape}, {bytes_text(whole.bytes)}, "
            f"{one.count} per step"
        )
        yield line if module is None else f"{line}; {one.name}, {module(one) or 'outside'}"

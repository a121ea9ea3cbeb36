"""What sections of the benchmark are given and what they return, without JAX and without torch."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "wrong", "skipped", "failed"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a section.

    Attributes:
      section: whose it is.
      name: what was run: `triton`, `cudnn`, ...
      problem: on what; rows of the same problem can be compared.
      status: `wrong` is a result beyond its tolerance, `failed` an error.
      milliseconds: median over repetitions, None where nothing was timed.
      spread: milliseconds between the quartiles.
      flops: that the result needs; of attention those of the pairs that attend, `flops_done` those
        of whole blocks.
      bytes: that must be moved at least.
      error: relative, in the Frobenius norm.
      tolerance: of the error.
      clock: `cupti` and `events` are device time, `host` is wall time of a full queue.
      note: a reason, or what else is to be known.
    """

    section: str
    name: str
    problem: str
    status: Status = "ok"
    milliseconds: float | None = None
    spread: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    error: float | None = None
    tolerance: float | None = None
    clock: str = ""
    note: str = ""

    @property
    def tflops(self) -> float | None:
        """10^12 operations per second, None where that says nothing."""
        return self.flops / self.milliseconds / 1e9 if self.milliseconds and self.flops else None

    @property
    def gigabytes(self) -> float | None:
        """10^9 bytes per second, likewise."""
        return self.bytes / self.milliseconds / 1e6 if self.milliseconds and self.bytes else None


def checked(section: str, name: str, problem: str, error: float, tolerance: float) -> Row:
    """The row of a comparison; NaN is wrong."""
    right = math.isfinite(error) and error < tolerance
    return Row(
        section,
        name,
        problem,
        "ok" if right else "wrong",
        error=error if math.isfinite(error) else None,
        tolerance=tolerance,
        note="" if right else f"relative error {error:.2e}",
    )


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention problem, of BigBird's layout.

    Attributes:
      name: unique.
      seq: tokens.
      block: of the layout.
      random, window: blocks per row of the layout; one more block is global. No window: all
        blocks are attended to.
      causal: whether tokens see later ones.
      backward: whether gradients are timed, too.
    """

    name: str
    seq: int
    block: int
    random: int = 0
    window: int = 0
    heads: int = 16
    dim: int = 128
    causal: bool = False
    backward: bool = False

    @property
    def dense(self) -> bool:
        return self.window == 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
      smoke: on a CPU, interpreted, to see that the sections run; times mean nothing.
      seed: of the random inputs.
      repeats: of a measurement.
      copy_bytes: of one array that is copied.
      matmul: rows and columns of the large product.
      attention: problems.
      parameters: sizes of the arrays that AdamW updates.
      norms: rows and widths of the arrays that are normalised.
      checks: how many cases of each kernel are checked.
      l2_bytes: inputs are taken in turn from sets of more than this.
    """

    smoke: bool
    seed: int
    repeats: int
    copy_bytes: int
    matmul: int
    attention: tuple[Attention, ...]
    parameters: tuple[tuple[int, ...], ...]
    norms: tuple[tuple[int, int], ...]
    checks: int
    l2_bytes: int = 128 * 2**20

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        values: dict[str, Any] = json.loads(text)
        values["attention"] = tuple(Attention(**one) for one in values["attention"])
        for name in ("parameters", "norms"):
            values[name] = tuple(tuple(one) for one in values[name])
        return Plan(**values)


def plan(seed: int, *, quick: bool = False, smoke: bool = False) -> Plan:
    """The sizes of a run; a quick one takes about a third of the time."""
    if smoke:
        problems = (Attention("smoke", 256, 64, 1, 1, heads=2, dim=64, backward=True),)
        return Plan(
            True, seed, 2, 2**16, 64, problems, ((64, 32), (48,)), ((8, 96),), 1, l2_bytes=1
        )
    problems = (
        Attention("64k, 10%", 65536, 128, 26, 25),
        Attention("16k, 10%", 16384, 128, 6, 5, backward=True),
        Attention("16k, all", 16384, 128, backward=True),
        Attention("16k, causal", 16384, 128, causal=True),
        Attention("4k, block 16", 4096, 16, 8, 9, backward=True),
    )
    # A transformer's weights: many of a few sizes, half a billion elements.
    layer = ((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),) + ((4096,),) * 2
    return Plan(
        False,
        seed,
        5 if quick else 11,
        2**30,
        8192,
        problems[:3] if quick else problems,
        layer * (1 if quick else 3),
        ((32768, 4096),) if quick else ((32768, 4096), (16384, 8192)),
        2 if quick else 6,
    )


class Clock:
    """Emits rows as they come, and says when a section's time is over.

    clock = Clock(path, seconds=60)
    if not clock.over("attention", "triton", "64k"):
        clock.emit(row)
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds

    def emit(self, row: Row) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def over(self, section: str, name: str, problem: str) -> bool:
        """Whether the time is over; then the row says so."""
        if time.monotonic() < self._end:
            return False
        self.emit(Row(section, name, problem, "skipped", note="the section's time was over"))
        return True


def read_rows(path: Path) -> list[Row]:
    """What was emitted; a line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except json.JSONDecodeError:
            continue
    return rows


def reason_of(error: BaseException) -> str:
    """The first line of an error, for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]

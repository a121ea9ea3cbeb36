"""What the figures are compared with, and what they should reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from benchmarks.on_gpu.rows import Row

SPARSE, DENSE, GRADIENTS = "64k, 10%", "16k, all", "16k, 10%, forward and backward"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A ratio of two rows.

    Attributes:
      what: in words.
      ratio: larger is better; None where one of the two is missing.
      target: that it should reach; None where there is none.
    """

    what: str
    ratio: float | None
    target: float | None

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not measured"
        if self.target is None:
            return ""
        return "pass" if self.ratio >= self.target else "FAIL"


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """All ratios, those that are missing too."""
    found = {(row.section, row.name, row.problem): row for row in rows if row.status == "ok"}
    problems = list(dict.fromkeys(row.problem for row in rows if row.section == "attention"))

    def attention(name: str, problem: str) -> Row | None:
        section = "torch attention" if name == "flex_attention" else "attention"
        return found.get((section, name, problem))

    made = []
    for name, share in (("triton", 0.65), ("mosaic", 0.85)):
        mine, dense = attention(name, SPARSE), attention("cudnn", SPARSE)
        made += [
            _compared(f"{name}, {SPARSE}: times faster than dense cuDNN", _speed, mine, dense, 6.3),
            _compared(f"{name}, {SPARSE}: rate by dense cuDNN's", _rate, mine, dense, share),
        ]
        for problem in problems:
            target = 1.0 if "10%" in problem else None
            flex = attention("flex_attention", problem)
            if flex or target:
                text = f"{name}, {problem}: times faster than flex_attention"
                made.append(_compared(text, _speed, attention(name, problem), flex, target))
            if problem != SPARSE:
                text = f"{name}, {problem}: rate by cuDNN's on all or causal pairs"
                cudnn = attention("cudnn", problem)
                made.append(_compared(text, _rate, attention(name, problem), cudnn, None))
    fused, copy = found.get(("adamw", "fused_adamw", "step")), _named(found, "limits", "copy")
    made += [
        _compared("fused AdamW: bytes per second by a copy's", _bandwidth, fused, copy, 0.9),
        _compared(
            "fused AdamW: bytes per second by torch fused's",
            _bandwidth,
            fused,
            _named(found, "torch adamw", "torch fused"),
            1.0,
        ),
        _compared(
            "fused AdamW: times faster than optax.adamw",
            _speed,
            fused,
            _named(found, "adamw", "optax.adamw"),
            None,
        ),
    ]
    for problem in dict.fromkeys(row.problem for row in rows if row.section == "rms_norm"):
        mine, xla = (found.get(("rms_norm", name, problem)) for name in ("triton", "xla"))
        made += [
            _compared(f"RMSNorm, {problem}: times faster than XLA's", _speed, mine, xla, None),
            _compared(
                f"RMSNorm, {problem}: bytes per second by a copy's", _bandwidth, mine, copy, None
            ),
        ]
    return made


def _named(found: dict[tuple[str, str, str], Row], section: str, name: str) -> Row | None:
    return next((row for key, row in found.items() if key[:2] == (section, name)), None)


def _compared(
    what: str,
    ratio: Callable[[Row, Row], float | None],
    mine: Row | None,
    other: Row | None,
    target: float | None,
) -> Comparison:
    return Comparison(what, ratio(mine, other) if mine and other else None, target)


def _speed(mine: Row, other: Row) -> float | None:
    return (
        other.milliseconds / mine.milliseconds if mine.milliseconds and other.milliseconds else None
    )


def _rate(mine: Row, other: Row) -> float | None:
    return mine.tflops / other.tflops if mine.tflops and other.tflops else None


def _bandwidth(mine: Row, other: Row) -> float | None:
    return mine.gigabytes / other.gigabytes if mine.gigabytes and other.gigabytes else None

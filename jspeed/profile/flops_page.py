"""The FLOPs of a step as text: what it computes, how fast, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.profile.owners import Phase
from jspeed.profile.step_flops import ModuleFlops, StepFlops
from jspeed.profile.tree import walk

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


@dataclass(frozen=True)
class FlopsReport:
    """A step that was measured.

    Attributes:
      flops: of the step.
      step: its number.
      seconds: that it took.
      device_kind: as JAX tells it.
      compute_dtype: of the model's products, which the peak is of.
      peak: FLOP/s of one device; None where it is not known.
      remarks: on the measurement.
    """

    flops: StepFlops
    step: int
    seconds: float
    device_kind: str
    compute_dtype: str
    peak: float | None
    remarks: tuple[str, ...] = ()

    @property
    def achieved(self) -> float:
        """FLOP/s on all devices, recomputation included."""
        return self.flops.total / self.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (PaLM, appendix B): forward and backward against the peak; None
        where none is known."""
        return self._share(self.flops.of_model)

    @property
    def hfu(self) -> float | None:
        """The same of all FLOPs, recomputation included; None where no peak is known."""
        return self._share(self.flops.total)

    def _share(self, flops: float) -> float | None:
        if self.peak is None:
            return None
        return flops / (self.seconds * self.peak * self.flops.devices)

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "devices": self.flops.devices,
            "device_kind": self.device_kind,
            "flops": self.flops.total,
            "recomputed_flops": self.flops.recomputed,
            "flops_by_dtype": dict(self.flops.dtypes),
            "flops_per_second": self.achieved,
            "peak_flops_per_second": self.peak,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "not_counted": list(self.flops.unknown),
            "model": self.flops.model.to_json(),
        }


def flops_page(
    report: FlopsReport, *, module_depth: int = -1, top_modules: int = 1, detailed: bool = True
) -> str:
    """The report as text.

    Args:
      report: of a step.
      module_depth: modules down to this depth are shown; -1 is all, the model itself 0.
      top_modules: of each depth, those with the most FLOPs.
      detailed: shows the tree of modules.
    """
    tables = flops_tables(
        report.flops, module_depth=module_depth, top_modules=top_modules, detailed=detailed
    )
    return "\n".join([*_head(report), "", *tables])


def flops_tables(
    flops: StepFlops, *, module_depth: int = -1, top_modules: int = 1, detailed: bool = True
) -> list[str]:
    """The lines about modules alone; arguments as of `flops_page`."""
    deepest = max(depth for depth, _ in walk(flops.model))
    last = deepest if module_depth < 0 else min(module_depth, deepest)
    lines = list(_top(flops.model, last, top_modules))
    return [*lines, "", *_tree(flops.model, last)] if detailed else lines


def amount(value: float, unit: str = "") -> str:
    """`2.5e9, "FLOP"` -> `"2.50 GFLOP"`."""
    for size, prefix in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}{unit}".rstrip()
    return f"{value:.0f} {unit}".rstrip()


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in columns; the first is flush left, the others flush right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _head(report: FlopsReport) -> Iterator[str]:
    flops, devices = report.flops, report.flops.devices
    phases = ", ".join(
        f"{phase.value} {amount(flops.model.flops[phase])}"
        for phase in Phase
        if flops.model.flops[phase]
    )
    on = f"{devices} x {report.device_kind}"
    yield f"FLOPs of step {report.step} on {on}, from its compiled program"
    yield f"parameters      {flops.model.parameters:,}"
    yield f"FLOPs per step  {amount(flops.total)} ({phases})"
    yield f"step time       {1e3 * report.seconds:.2f} ms"
    rate = f"{amount(report.achieved, 'FLOP/s')}"
    yield f"achieved        {rate}, {amount(report.achieved / devices, 'FLOP/s')} per device"
    yield f"MFU             {_utilisation(report)}"
    if flops.unknown:
        yield f"not counted     products inside of {', '.join(flops.unknown)}"
    for remark in report.remarks:
        yield f"note: {remark}"


def _utilisation(report: FlopsReport) -> str:
    mfu, hfu = report.mfu, report.hfu
    if mfu is None or hfu is None or report.peak is None:
        return f'unknown: no peak of "{report.device_kind}" in {report.compute_dtype} is known'
    text = f"{mfu:.1%} of {amount(report.peak, 'FLOP/s')} per device in {report.compute_dtype}"
    return text if hfu == mfu else f"{text}; {hfu:.1%} with all that is computed (HFU)"


def _top(model: ModuleFlops, last: int, count: int) -> Iterator[str]:
    yield f"most FLOPs by depth (top {count})"
    for depth in range(1, last + 1):
        nodes = [node for at, node in walk(model) if at == depth and node.total]
        best = sorted(nodes, key=lambda node: -node.total)[:count]
        if best:
            named = ", ".join(
                f"{_full_name(node)} {amount(node.total)} ({_share(node, model)})" for node in best
            )
            yield f"  {depth}  {named}"


def _tree(model: ModuleFlops, last: int) -> list[str]:
    phases = [phase for phase in Phase if model.flops[phase] or phase is Phase.FORWARD]
    rows = [["module", "parameters", "FLOPs", "share", *(phase.value for phase in phases)]]
    for depth, node in walk(model):
        if depth <= last and (node.total or node.parameters):
            rows.append(
                [
                    "  " * depth + node.name,
                    f"{node.parameters:,}" if node.parameters else "-",
                    amount(node.total),
                    _share(node, model),
                    *(amount(node.flops[phase]) for phase in phases),
                ]
            )
    return columns(rows)


def _full_name(node: ModuleFlops) -> str:
    if not node.name.startswith("("):
        return node.path
    return f"{node.path} {node.name}".strip()


def _share(node: ModuleFlops, model: ModuleFlops) -> str:
    return f"{node.total / model.total:.1%}" if model.total else "-"

"""`jspeed explain`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jspeed.cli.console import live_text, make_console
from jspeed.config import load_config
from jspeed.core.units import bytes_text
from jspeed.engine.explain import RunExplanation, explain_run
from jspeed.layout.explain import STATE_ROLES, Explanation, LeafExplanation, Share
from jspeed.layout.rules import spec_text
from jspeed.layout.zero import Role

_SHORTEST_PATH = 20


def explain_command(
    run: str, overrides: Sequence[str], *, as_json: bool, devices: int | None
) -> None:
    """Prints where the training state of a run file would live on a number of devices."""
    explanation = explain_run(load_config(run, overrides=tuple(overrides)), devices=devices)
    if as_json:
        print(json.dumps(explanation.to_json(), indent=2))
    else:
        render(explanation, make_console())


@dataclass(frozen=True)
class Row:
    """Parameters that differ in nothing but numbers in their paths."""

    path: str
    leaves: tuple[LeafExplanation, ...]

    @property
    def label(self) -> str:
        return self.path if len(self.leaves) == 1 else f"{self.path} ({len(self.leaves)} x)"

    def bytes(self, role: Role) -> int:
        """Of all of them on one device."""
        shares = [leaf.shares[role] for leaf in self.leaves if role in leaf.shares]
        return sum(share.bytes_per_device for share in shares)


def rows(leaves: Sequence[LeafExplanation]) -> list[Row]:
    """Groups the layers of an unrolled model: `blocks/0/kernel, blocks/1/kernel` become one row."""
    groups: dict[tuple[object, ...], list[LeafExplanation]] = {}
    for leaf in leaves:
        pattern = "/".join("*" if part.isdigit() else part for part in leaf.path.split("/"))
        shares: tuple[tuple[Role, Share], ...] = tuple(leaf.shares.items())
        key = (pattern, leaf.shape, leaf.logical_axes, leaf.rule, leaf.whole_because, shares)
        groups.setdefault(key, []).append(leaf)
    return [
        Row(group[0].path if len(group) == 1 else str(key[0]), tuple(group))
        for key, group in groups.items()
    ]


def render(explanation: RunExplanation, console: Console) -> None:
    """Prints an explanation for people."""
    state = explanation.state
    console.print(Text(_heading(state), "bold"))
    console.print()
    _print_table(state, console)
    console.print()
    for line in _totals(state):
        console.print(Text(line))
    if explanation.pipeline is not None:
        _section(console, "Pipeline", pipeline_lines(explanation), "")
    _section(console, "Kept whole on every device", _whole(state), "yellow")
    early = [f"{path}: {because}" for path, because in state.notes]
    _section(console, "Not gathered layer by layer, which costs memory", early, "yellow")
    _section(console, "Assumed", explanation.remarks, "")
    title = "Not built yet: not in these figures, and training refuses it"
    _section(console, title, explanation.not_built, "yellow")


def pipeline_lines(explanation: RunExplanation) -> list[str]:
    """The schedule, which layers are where, and what every stage holds beside them."""
    pipeline, state = explanation.pipeline, explanation.state
    assert pipeline is not None
    schedule, figures = pipeline.schedule, pipeline.figures
    chunks = f" of {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    lines = [
        f"{schedule.kind} over {schedule.stages} stages{chunks}, {schedule.microbatches} "
        f"microbatches: bubble {figures.bubble:.1%} (textbook {figures.textbook_bubble:.1%}); "
        f"{live_text(figures.peak_live, schedule.chunks)}"
    ]
    for stage, parts in enumerate(pipeline.layers):
        lines.append(f"stage {stage}: layers {', '.join(map(_span, parts))}")
    shared = [leaf for leaf in state.leaves if leaf.path in pipeline.shared]
    size = bytes_text(sum(leaf.bytes_per_device for leaf in shared))
    paths = ", ".join(row.label for row in rows(shared))
    lines.append(f"every stage: {paths}, {size} on one device")
    return lines


def _span(part: range) -> str:
    return str(part.start) if len(part) == 1 else f"{part.start}-{part.stop - 1}"


def _section(console: Console, title: str, lines: Sequence[str], style: str) -> None:
    if lines:
        console.print()
        console.print(Text(f"{title}:", style))
        for line in lines:
            console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def _heading(state: Explanation) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in state.sizes.items() if size > 1)
    devices = f"{state.devices:,} devices: {axes}" if state.devices > 1 else "1 device"
    return (
        f"{state.parameters:,} parameters in {state.compute_dtype}, ZeRO stage {state.stage}, "
        f"{devices}"
    )


Cells = tuple[str, ...]


@dataclass(frozen=True)
class Lines:
    """The cells of the table; `groups` has the rows of each rule."""

    head: Cells
    groups: dict[str, list[Cells]]
    total: Cells

    @property
    def widths(self) -> list[int]:
        lines = [
            self.head,
            self.total,
            *(cells for group in self.groups.values() for cells in group),
        ]
        return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _print_table(state: Explanation, console: Console) -> None:
    """One line per row, the rows of each rule under the rule; names of dimensions where they
    fit."""
    lines = _lines(state, with_names=True)
    named = any(leaf.logical_axes for leaf in state.leaves)
    if not named or sum(lines.widths) + 2 * len(lines.widths) > console.width:
        lines = _lines(state, with_names=False)
    widths = lines.widths
    # Numbers and shapes stay whole; on a narrow terminal paths are folded.
    room = console.width - sum(widths[1:]) - 2 * len(widths)
    widths[0] = min(widths[0], max(room, _SHORTEST_PATH))
    console.print(_grid([lines.head], widths, "bold"))
    for rule, group in lines.groups.items():
        console.print()
        console.print(Text(rule, "cyan"))
        console.print(_grid(group, widths, ""))
    console.print()
    console.print(_grid([lines.total], widths, "bold"))


def _lines(state: Explanation, *, with_names: bool) -> Lines:
    def cells(first: str, names: str, *rest: str) -> Cells:
        return (first, names, *rest) if with_names else (first, *rest)

    groups: dict[str, list[Cells]] = {}
    for row in rows(state.leaves):
        leaf = row.leaves[0]
        line = cells(
            f"  {row.label}",
            " ".join(leaf.logical_axes or ()),
            "x".join(map(str, leaf.shape)) or "scalar",
            spec_text(leaf.home.spec),
            *(bytes_text(row.bytes(role)) for role in STATE_ROLES),
        )
        groups.setdefault(leaf.rule, []).append(line)
    roles = [role.value for role in STATE_ROLES]
    sums = [bytes_text(state.role_bytes(role)) for role in STATE_ROLES]
    return Lines(
        cells("parameter", "dimensions", "shape", "split over", *roles),
        groups,
        cells("on one device", "", "", "", *sums),
    )


def _grid(lines: Sequence[Cells], widths: Sequence[int], style: str) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for position, width in enumerate(widths):
        right = position >= len(widths) - len(STATE_ROLES)
        table.add_column(
            width=width, justify="right" if right else "left", overflow="fold", style=style
        )
    for cells in lines:
        table.add_row(*map(Text, cells))
    return table


def _totals(state: Explanation) -> Iterator[str]:
    total, other = state.total_bytes, sum(state.other_bytes.values())
    yield (
        f"In all {bytes_text(total)} on one device"
        + (
            f", {bytes_text(total * state.devices)} on all {state.devices:,}"
            if state.devices > 1
            else ""
        )
        + f"; counters, keys and other state add {bytes_text(other)} to each."
    )
    if state.host_bytes:
        yield (
            f"Master and moments of {state.parameters_on_host:,} parameters are offloaded: "
            f"{bytes_text(state.host_bytes - state.host_parameter_bytes)} for each device."
        )
    if state.host_parameter_bytes:
        yield (
            "Parameters of layers are fetched from host memory, and their gradients leave for it: "
            f"{bytes_text(state.host_parameter_bytes)} more for each device."
        )
    if Role.PARAM not in {role for leaf in state.leaves for role in leaf.shares}:
        yield (
            "No copy in the compute dtype is stored: "
            + (
                "the fp32 master is the parameter."
                if state.compute_dtype == "float32"
                else "the master is cast at use, and gathered where it is split."
            )
        )


def _whole(state: Explanation) -> list[str]:
    """The parameters that stayed whole, by reason."""
    by_reason: dict[str, list[str]] = {}
    for row in rows(state.stayed_whole):
        by_reason.setdefault(row.leaves[0].whole_because, []).append(row.label)
    return [f"{reason}: {', '.join(labels)}" for reason, labels in by_reason.items()]

"""The page of `jspeed schedule`: tables drawn in the terminal, and their figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jspeed.pipeline.cost import tick_costs
from jspeed.pipeline.operations import Operation, Schedule

if TYPE_CHECKING:
    from jspeed.cli.schedule import Shown

# Letter and style of each operation.
_CELLS = {
    Operation.IDLE: (".", "dim"),
    Operation.FORWARD: ("F", "white on blue"),
    Operation.BACKWARD: ("B", "black on green"),
    Operation.BACKWARD_INPUT: ("B", "black on cyan"),
    Operation.BACKWARD_WEIGHT: ("W", "black on magenta"),
}
_LEGEND = {
    Operation.FORWARD: "F forward",
    Operation.BACKWARD: "B backward",
    Operation.BACKWARD_INPUT: "B input-backward",
    Operation.BACKWARD_WEIGHT: "W weight-backward",
}
_CHUNKS = "abcdefghijklmnopqrstuvwxyz"
# Of more blocks of ticks or stages than so many, the middle is left out.
_BLOCKS, _STAGES = 4, 16
_HEAD = ("kind", "chunks", "ticks", "time", "bubble", "textbook", "peak live", "sends")


def render(one: Shown, console: Console) -> None:
    """Prints a schedule's table, a row per stage, and its figures."""
    schedule = one.schedule
    console.print(Text(heading(schedule), "bold"))
    console.print()
    _print_table(one, console)
    present = np.unique(schedule.table[:, :, 0])
    legend = [name for operation, name in _LEGEND.items() if operation in present]
    of_chunks = "; a, b, ... are the chunks" if schedule.chunks > 1 else ""
    console.print(Text(f"{', '.join(legend)}{of_chunks}", "dim"))
    console.print()
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, text in _figures(one):
        grid.add_row(Text(name), Text(text))
    console.print(grid)


def render_all(chosen: Sequence[Shown], impossible: Mapping[str, str], console: Console) -> None:
    """Prints a table of schedules, and why others are not in it."""
    first = chosen[0].schedule
    remat = ", with recomputation" if chosen[0].costs.recompute else ""
    console.print(Text(f"{_sizes(first)}{remat}", "bold"))
    console.print()
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in _HEAD:
        left = column == "kind"
        table.add_column(justify="left" if left else "right", no_wrap=left)
    table.add_row(*(Text(cell, "bold") for cell in _HEAD))
    for one in chosen:
        table.add_row(*map(Text, _row(one)))
    console.print(table)
    console.print()
    console.print(
        Text(
            "Time is in forwards of a whole stage, of which "
            f"{chosen[0].figures.ideal_ticks:g} are work; peak live in microbatches of a whole "
            "stage, on the stage with the most.",
            "dim",
        )
    )
    for kind, reason in impossible.items():
        console.print(Text(f"{kind}: {reason}"))


def heading(schedule: Schedule) -> str:
    """`zb-h1: 4 stages, 8 microbatches`."""
    return f"{schedule.kind}: {_sizes(schedule)}" + (
        f", {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    )


def percent(share: float) -> str:
    """`0.1111` -> `"11.1%"`."""
    return f"{share * 100:.1f}%"


def _sizes(schedule: Schedule) -> str:
    stages, microbatches = schedule.stages, schedule.microbatches
    several = "es" * (microbatches != 1)
    return f"{stages} stage{'s' * (stages != 1)}, {microbatches} microbatch{several}"


def _row(one: Shown) -> tuple[str, ...]:
    schedule, found = one.schedule, one.figures
    return (
        schedule.kind,
        str(schedule.chunks),
        str(found.ticks),
        f"{found.weighted_ticks:g}",
        percent(found.bubble),
        percent(found.textbook_bubble),
        f"{max(found.peak_live) / schedule.chunks:g}",
        str(found.activations_sent[0] + found.gradients_sent[0]),
    )


def _figures(one: Shown) -> Iterable[tuple[str, str]]:
    schedule, found = one.schedule, one.figures
    yield "ticks", str(found.ticks)
    remat = ", recomputation included" if one.costs.recompute else ""
    yield (
        "time",
        f"{found.weighted_ticks:g} forwards of a whole stage, of which {found.ideal_ticks:g} are "
        f"work{remat}",
    )
    yield "bubble", f"{percent(found.bubble)}; the textbook's: {percent(found.textbook_bubble)}"
    if any(found.peak_live):
        what = "chunks of microbatches" if schedule.chunks > 1 else "microbatches"
        yield "peak live", f"{what} on each stage: {' '.join(map(str, found.peak_live))}"
    (activations, at_once), (gradients, gradients_at_once) = (
        found.activations_sent,
        found.gradients_sent,
    )
    yield (
        "sends",
        f"{activations} activations and {gradients} gradients; at most {at_once} and "
        f"{gradients_at_once} in a tick",
    )


# The drawing --------------------------------------------------------------------------------------


def _print_table(one: Shown, console: Console) -> None:
    """The table in blocks of ticks that fit the width; of a very long one the ends."""
    schedule = one.schedule
    label = len(f"stage {schedule.stages - 1}") + 2
    cell = 1 + max(
        len(str(schedule.ticks - 1)),
        len(_cell(Operation.FORWARD, schedule.microbatches - 1, schedule.chunks - 1, schedule)),
    )
    per_block = max(1, (console.width - label) // cell)
    starts = range(0, schedule.ticks, per_block)
    durations = tick_costs(schedule, one.costs)
    for index, start in _ends(list(starts), _BLOCKS):
        if index is None:
            first, last = starts[_BLOCKS // 2], starts[-(_BLOCKS // 2)] - 1
            text = f"... ticks {first} to {last}: see --output FILE.png or --json"
            console.print(Text(text, "dim"))
            console.print()
            continue
        ticks = range(start, min(start + per_block, schedule.ticks))
        _print_line(console, "tick", label, ((str(tick), "dim") for tick in ticks), cell)
        if len(set(durations)) > 1:
            lasts = ((f"{durations[tick]:.3g}", "dim") for tick in ticks)
            _print_line(console, "lasts", label, lasts, cell)
        for place, stage in _ends(list(range(schedule.stages)), _STAGES):
            if place is None:
                console.print(Text("...", "dim"))
                continue
            cells = (_styled(schedule, tick, stage) for tick in ticks)
            _print_line(console, f"stage {stage}", label, cells, cell)
        console.print()


def _ends(items: Sequence[int], most: int) -> Iterable[tuple[int | None, int]]:
    """Items with their index; of more than `most` those at both ends, with (None, 0) between."""
    if len(items) <= most:
        yield from enumerate(items)
        return
    half = most // 2
    yield from enumerate(items[:half])
    yield None, 0
    yield from enumerate(items[-half:], len(items) - half)


def _styled(schedule: Schedule, tick: int, stage: int) -> tuple[str, str]:
    code, microbatch, chunk = schedule.table[tick, stage].tolist()
    operation = Operation(code)
    return _cell(operation, microbatch, chunk, schedule), _CELLS[operation][1]


def _cell(operation: Operation, microbatch: int, chunk: int, schedule: Schedule) -> str:
    """`F3`, or `F3b` if there are chunks; `F3.30` if there are more than letters."""
    letter = _CELLS[operation][0]
    if operation is Operation.IDLE:
        return letter
    if schedule.chunks == 1:
        return f"{letter}{microbatch}"
    of_chunk = _CHUNKS[chunk] if schedule.chunks <= len(_CHUNKS) else f".{chunk}"
    return f"{letter}{microbatch}{of_chunk}"


def _print_line(
    console: Console, name: str, label: int, cells: Iterable[tuple[str, str]], width: int
) -> None:
    line = Text(name.ljust(label))
    for text, style in cells:
        line.append(text.ljust(width - 1), style).append(" ")
    line.rstrip()
    console.print(line, no_wrap=True, overflow="crop", crop=True)

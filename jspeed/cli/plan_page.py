"""The page that `jspeed plan` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jspeed.cli.console import live_text
from jspeed.cli.memory_picture import rows
from jspeed.core.units import bytes_text

Plan = Mapping[str, Any]

_PARTS = {
    "compute": "matrix products, at the rate the target reaches",
    "memory": "kernels that wait for the device's memory",
    "launch": "between kernels",
    "allocation": "temporaries that the system gives anew each step",
    "bubble": "waiting for another stage of the pipeline",
    "host link": "what moves between device and host for the offloaded optimizer",
}
_INDENT = (0, 0, 0, 2)


def render(plan: Plan, console: Console) -> None:
    """Prints a plan for people.

    Args:
      plan: as `jspeed.planner.plan.Plan.to_json` gives it.
      console: to print on.
    """
    console.print(Text(heading(plan), "bold"))
    console.print(Text(verdict(plan), "bold green" if plan["fits"] else "bold red"))
    if plan.get("remat") is not None:
        _rematerialisation(console, plan["remat"])
    _table(console, "Memory of one device", _memory_rows(plan["memory"]), right=(1,))
    if "live_bytes" in plan:
        _live(console, plan)
    else:
        title = "Largest temporaries at the peak"
        _table(console, title, _buffer_rows(plan["memory"]["largest"]), right=(0,))
    head = ("collective", "axis", "dtype", "count", "bytes")
    rows = [
        (
            entry["kind"],
            entry["axis"] or "-",
            entry["dtype"],
            f"{entry['count']:,}",
            bytes_text(entry["bytes"]),
        )
        for entry in plan["collectives"]
    ]
    _table(console, "Communication of one step, per device", rows, head=head, right=(3, 4))
    console.print(Padding(Text(volume_line(plan["volume"])), _INDENT, expand=False))
    _table(console, time_line(plan), _time_rows(plan), right=(1, 2))
    if plan["pipeline"]:
        line = pipeline_line(plan["pipeline"])
        console.print(Padding(Text(line), _INDENT, expand=False))
    _lines(console, "Held whole by every device", _whole(plan))
    _suggestions(console, plan)
    _lines(console, "Assumed", plan["remarks"])


def _rematerialisation(console: Console, chosen: Plan) -> None:
    """What was tried within a budget, and the line of a run file that was chosen."""
    rows = [
        (
            json.dumps(entry["policy"]),
            bytes_text(entry["peak_bytes"]),
            f"{entry['flops']:.3g} FLOPs",
            entry["reason"],
        )
        for entry in chosen["tried"]
    ]
    title = f"What to keep of each layer within {bytes_text(chosen['budget_bytes'])}, compiled"
    _table(console, title, rows, head=("model.remat", "needs", "", ""), right=(1, 2))
    line = f'To train so: "model": {{"remat": {json.dumps(chosen["policy"])}}}'
    console.print(Padding(Text(line), _INDENT, expand=False))


def heading(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    shards = math.prod(plan["mesh"][axis] for axis in ("replica", "data", "expert"))
    return (
        f"{plan['model']['family']}, {plan['model']['parameters']:,} parameters in "
        f"{plan['compute_dtype']}, ZeRO stage {plan['zero_stage']}, on {plan['gpus']:,} x "
        f"{plan['target']}{f' ({mesh})' if mesh else ''}; batch {plan['train_batch_size']:,} = "
        f"{plan['micro_batch_size']} per device x {plan['gradient_accumulation_steps']} "
        f"microbatch(es) x {shards} shard(s)"
    )


def verdict(plan: Plan) -> str:
    memory = plan["memory"]
    needs = f"{bytes_text(memory['peak_bytes'])} of {bytes_text(memory['limit_bytes'])}"
    if plan["fits"]:
        return f"Fits: needs {needs}, {bytes_text(memory['headroom_bytes'])} to spare."
    return f"Does not fit: needs {needs}, {bytes_text(-memory['headroom_bytes'])} too many."


def volume_line(volume: Plan) -> str:
    times = volume["microbatches"]
    per = f" ({times} microbatches)" if times > 1 else ""
    moved = f"{volume['parameter_multiples']:.2f} x the parameters over the batch axes"
    if volume["zero_paper"] is None:
        return f"{moved}, some of which are frozen{per}."
    return (
        f"{moved}; the ZeRO paper has {volume['zero_paper']:.0f} x for stage "
        f"{volume['zero_stage']}{per}."
    )


def time_line(plan: Plan) -> str:
    if plan["tokens_per_second"] is not None:
        rate = f"{plan['tokens_per_second']:,.0f} tokens/s"
    else:
        rate = f"{plan['samples_per_second']:,.1f} samples/s"
    mfu = "" if plan["mfu"] is None else f", MFU {plan['mfu']:.1%}"
    return (
        f"A step takes {seconds_text(plan['step_seconds'])} (predicted): {rate}{mfu}, bound by "
        f"{part_text(plan['bound'])}"
    )


def pipeline_line(pipeline: Plan) -> str:
    """What the schedule costs in time and memory, and of which stage the page speaks."""
    chunks = pipeline["chunks"]
    cut = f" of {chunks} chunks" if chunks > 1 else ""
    return (
        f"{pipeline['schedule']} over {pipeline['stages']} stages{cut}, "
        f"{pipeline['microbatches']} microbatches: bubble {pipeline['bubble']:.1%} by its table, "
        f"{pipeline['textbook_bubble']:.1%} by the textbook; "
        f"{live_text(pipeline['peak_live'], chunks)}. Time and communication are those of stage "
        f"{pipeline['busiest_stage']}, which works longest; it waits {pipeline['waiting']:.1%} of "
        "the step."
    )


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def part_text(part: str) -> str:
    return part.replace("network:", "the network of ").replace("+", " and ")


def _memory_rows(memory: Plan) -> Iterator[tuple[str, ...]]:
    for name in ("parameters", "master", "moments", "other_state", "batch"):
        yield name.replace("_", " "), bytes_text(memory[name])
    held = 0
    for role, size in memory["at_peak"].items():
        held += size
        yield f"{role.replace('_', ' ')} at the peak", bytes_text(size)
    if held < memory["temporaries"]:
        rest = "temporaries" if not held else "gaps between temporaries"
        yield rest, bytes_text(memory["temporaries"] - held)
    yield "in all", bytes_text(memory["peak_bytes"])
    yield "the device has", bytes_text(memory["limit_bytes"])
    if memory["host_bytes"]:
        yield "on the host, for each device", bytes_text(memory["host_bytes"])


def _live(console: Console, plan: Plan) -> None:
    """What is held as the step goes, and at the peak."""
    live = plan["live_bytes"]
    lines = [
        (f"{100 * number // len(found)}%", bytes_text(row[0]), *row[1:])
        for found in [list(rows(live))]
        for number, row in enumerate(found)
    ]
    head = ("step", "held", "", "most of it", "at its fullest in")
    _table(console, "Held by one device as the step goes", lines, head=head, right=(0, 1))
    line = f"drawn in {plan['memory_picture']}"
    console.print(Padding(Text(line), _INDENT, expand=False))
    _table(console, "Largest held at the peak", _buffer_rows(live["holders"]), right=(0,))


def _buffer_rows(buffers: Sequence[Plan]) -> Iterator[tuple[str, ...]]:
    """Equal buffers, those of a layer's parts, in one line."""
    counts: dict[tuple[str, ...], list[int]] = {}
    for buffer in buffers:
        key = (buffer["type"], buffer["role"], buffer["origin"])
        counts.setdefault(key, []).append(buffer["bytes"])
    for (kind, role, origin), sizes in counts.items():
        times = f"{len(sizes)} x " if len(sizes) > 1 else ""
        yield bytes_text(sum(sizes)), f"{times}{kind}", role, origin


def _time_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    time, total = plan["time"], plan["step_seconds"]
    for part, seconds in sorted(time["parts"].items(), key=lambda item: -item[1]):
        axes = part.removeprefix("network:")
        note = _PARTS.get(part, "")
        if part.startswith("network:"):
            busy = seconds_text(time["network_busy"][axes])
            note = f"waiting for collectives, which are on their way for {busy}"
        yield part_text(part), seconds_text(seconds), f"{seconds / total:.1%}", note
    yield (
        "matrix products",
        f"{plan['flops']:.3g} FLOPs",
        "",
        f"{plan['flops'] / plan['model_flops']:.2f} x the model's own"
        if plan["model_flops"]
        else "",
    )


def _whole(plan: Plan) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for entry in plan["kept_whole"]:
        by_reason.setdefault(entry["because"], []).append(entry["path"])
    return [f"{', '.join(paths)}: {reason}" for reason, paths in by_reason.items()]


def _suggestions(console: Console, plan: Plan) -> None:
    rows = []
    for entry in plan["suggestions"]:
        if "error" in entry:
            rows.append((entry["change"], "refused", "", entry["error"]))
            continue
        rows.append(
            (
                entry["change"],
                "fits" if entry["fits"] else "does not fit",
                bytes_text(entry["peak_bytes"]),
                f"a step takes {seconds_text(entry['step_seconds'])}" if entry["fits"] else "",
            )
        )
    head = ("changed alone", "", "needs", "")
    _table(console, "What would make it fit, compiled", rows, head=head, right=(2,))


def _table(
    console: Console,
    title: str,
    rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]],
    *,
    head: Sequence[str] = (),
    right: Sequence[int] = (),
) -> None:
    lines = list(rows)
    if not lines:
        return
    console.print()
    console.print(Text(title, "cyan"))
    table = Table.grid(padding=(0, 2, 0, 0))
    for position in range(len(lines[0])):
        table.add_column(justify="right" if position in right else "left", overflow="fold")
    if head:
        table.add_row(*(Text(cell, "bold") for cell in head))
    for line in lines:
        table.add_row(*map(Text, line))
    console.print(Padding(table, _INDENT, expand=False))


def _lines(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print()
        console.print(Text(f"{title}:", "yellow"))
        for line in lines:
            console.print(Padding(Text(line), _INDENT, expand=False))

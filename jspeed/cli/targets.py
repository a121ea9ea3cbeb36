"""`jspeed targets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jspeed.cli.console import make_console
from jspeed.core.errors import ConfigError
from jspeed.core.units import bytes_text
from jspeed.planner.targets import TARGETS, Target, load_target, target_data
from jspeed.planner.targets.load import ALIASES, CPU, measured_path

_HEAD = ("target", "memory", "bf16", "fp32", "memory rate", "in a host", "network", "")


def targets_command(name: str | None, *, as_json: bool, measure: bool, output: Path | None) -> None:
    """Prints the known targets, or one with the source of each figure; measures this machine.

    Raises:
      ConfigError: the options do not go together.
      JspeedError: the target is unknown or damaged, or measuring failed.
    """
    if output is not None and not measure:
        raise ConfigError(
            '"--output": says where --measure writes. Add --measure, or leave it out.'
        )
    console = make_console()
    if measure:
        name = _measure(name, output, console, quiet=as_json)
    if as_json:
        chosen = target_data(name) if name else {known: target_data(known) for known in _there()}
        print(json.dumps(chosen, indent=2))
    elif name:
        render_target(load_target(name), console)
    else:
        render_targets([load_target(known) for known in _there()], console)


def _measure(name: str | None, output: Path | None, console: Console, *, quiet: bool) -> str:
    """Measures the CPU and returns the path of its file."""
    if name not in (None, CPU):
        raise ConfigError(
            f'"--measure": measures this machine, {CPU!r}, not {name!r}. Leave the target out.'
        )
    from jspeed.planner.measure import measure_cpu

    path = output or measured_path()
    if path.suffix != ".json":
        raise ConfigError(f'"--output": "{path}" is no target file, which ends in .json.')
    if not quiet:
        console.print("Measuring this machine for under a minute; leave it alone meanwhile.")
    measure_cpu(path)
    if not quiet:
        console.print(Text(f"Written to {path}"))
        console.print()
    return str(path)


def _there() -> list[str]:
    """The targets that have figures on this machine."""
    return [*TARGETS, *([CPU] if measured_path().is_file() else [])]


def render_targets(targets: list[Target], console: Console) -> None:
    """Prints a table of targets."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in _HEAD:
        right = column not in (_HEAD[0], _HEAD[-1])
        table.add_column(justify="right" if right else "left", no_wrap=right)
    table.add_row(*(Text(cell, "bold") for cell in _HEAD))
    for target in targets:
        table.add_row(*map(Text, _row(target)))
    console.print(table)
    console.print()
    short = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    lines = [
        "Peaks per device, links in one direction; jspeed targets NAME has what programs reach and "
        "the sources.",
        f"Also: {short}; the path of a target file of your own.",
    ]
    if CPU not in (target.name for target in targets):
        lines.append(f"{CPU}, this machine, was not measured yet: jspeed targets --measure")
    for line in lines:
        console.print(Text(line))


def _row(target: Target) -> tuple[str, ...]:
    return (
        target.name,
        bytes_text(target.memory_bytes),
        rate_text(target.peak_flops("bfloat16"), "FLOP/s"),
        rate_text(target.peak_flops("float32"), "FLOP/s"),
        rate_text(target.memory_bandwidth, "B/s"),
        rate_text(target.device_link.bandwidth, "B/s"),
        "-" if target.platform == "cpu" else rate_text(target.network.bandwidth, "B/s"),
        target.description,
    )


def render_target(target: Target, console: Console) -> None:
    """Prints each figure of a target with its source."""
    console.print(Text(f"{target.name}: {target.description}", "bold"))
    console.print()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for figure, value in figures(target).items():
        table.add_row(Text(figure), Text(value), Text(target.sources[figure], "dim"))
    console.print(table)
    console.print()
    share = f"{bytes_text(target.limit_bytes)} for a program's arrays"
    console.print(
        Text(
            f"{share} in all, which the devices share."
            if target.platform == "cpu"
            else f"{share} on each GPU."
        )
    )


def figures(target: Target) -> dict[str, str]:
    """The figures of a target as text, under the names that `sources` has."""
    found: dict[str, str] = {
        "memory_bytes": bytes_text(target.memory_bytes),
        "usable_fraction": _share(target.usable_fraction),
        "memory_bandwidth": rate_text(target.memory_bandwidth, "B/s"),
        "launch_seconds": seconds_text(target.launch_seconds),
    }
    found |= {f"flops.{dtype}": rate_text(rate, "FLOP/s") for dtype, rate in target.flops.items()}
    found |= {f"efficiency.{what}": _share(share) for what, share in target.efficiency.items()}
    for name in ("device_link", "network", "host_link"):
        link: Any = getattr(target, name)
        found[f"{name}.bandwidth"] = rate_text(link.bandwidth, "B/s")
        found[f"{name}.latency"] = seconds_text(link.latency)
    if target.fresh_memory is not None:
        fresh = target.fresh_memory
        found["fresh_memory.bandwidth"] = rate_text(fresh.bandwidth, "B/s")
        found["fresh_memory.threshold"] = bytes_text(fresh.threshold)
    if target.compiler is not None:
        found["compiler"] = f"{target.compiler.count(':')} fields"
    return found


def rate_text(rate: float, unit: str) -> str:
    """`9.894e14, "FLOP/s"` -> `"989.4 TFLOP/s"`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if rate < 1000 or prefix == "P":
            break
        rate /= 1000
    return f"{rate:,.4g} {prefix}{unit}"


def seconds_text(seconds: float) -> str:
    """`1.4e-05` -> `"14 us"`."""
    return f"{seconds * 1e6:,.3g} us"


def _share(share: float) -> str:
    return f"{share * 100:.3g}%"

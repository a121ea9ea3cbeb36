"""Golden plans: what is kept of a plan, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jspeed.config import load_config
from jspeed.core.units import bytes_text
from jspeed.planner.cluster import Cluster
from jspeed.planner.plan import Plan, make_plan
from jspeed.planner.targets import load_target

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).parent / "golden"
CPU_TARGET = Path(__file__).parent / "cpu_target.json"
"""A CPU with round figures, since those of the machine at hand are its own."""

STATE = ("parameters", "master", "moments", "other_state")
SAME_VERSION = {"": 0.0, "step_seconds": 0.01, "flops": 1e-3}
OTHER_VERSION = {"": 0.0, "step_seconds": 0.06, "flops": 1e-3, "memory.peak": 0.05}
"""Relative tolerances, by what a figure's name starts with. What XLA's schedule decides moves by so
much between JAX 0.10.2 and 0.12.0 (4% for a step, 3.5% for the peak)."""
_OF_ONE_VERSION = ("memory.at_peak", "bound")
"""Which temporaries are alive at the peak, and what is ahead by a hair, is up to each XLA."""


def cluster_of(path: Path) -> Cluster:
    """The cluster that a run file names; the CPU's figures are those of `CPU_TARGET`."""
    config = load_config(path)
    asked = config.cluster
    name = asked.gpu or "cpu"
    target = load_target(str(CPU_TARGET) if name == "cpu" else name)
    return Cluster(target, asked.gpus or config.mesh.data, asked.gpus_per_host)


def plan_of(path: Path) -> Plan:
    """The plan of a shipped run."""
    return make_plan(load_config(path), cluster_of(path))


def kept(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a golden plan holds of a plan's JSON.

    XLA writes other programs for other CPUs (bfloat16 with and without instructions for it), so of
    plans for the CPU only what does not depend on them is kept.
    """
    memory, cpu = plan["memory"], plan["target"].startswith("cpu")
    golden: dict[str, Any] = {
        "jax": jax.__version__,
        "target": plan["target"],
        "gpus": plan["gpus"],
        "mesh": {axis: size for axis, size in plan["mesh"].items() if size > 1},
        "zero_stage": plan["zero_stage"],
        "microbatches": plan["gradient_accumulation_steps"],
        "model_parameters": plan["model"]["parameters"],
        "fits": plan["fits"],
        "memory": {role: memory[role] for role in (*STATE, "batch")},
        "volume": round(plan["volume"]["parameter_multiples"], 2),
        "flops": plan["flops"],
        "model_flops": plan["model_flops"],
        "kept_whole": sorted(entry["path"] for entry in plan["kept_whole"]),
    }
    if cpu:
        return golden
    golden["memory"] |= {"at_peak": dict(memory["at_peak"]), "peak": memory["peak_bytes"]}
    golden["collectives"] = {
        f"{entry['kind']} over {entry['axis']} in {entry['dtype']}": {
            "count": entry["count"],
            "bytes": entry["bytes"],
        }
        for entry in plan["collectives"]
    }
    return golden | {"step_seconds": float(f"{plan['step_seconds']:.3g}"), "bound": plan["bound"]}


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per figure that differs by more than its tolerance: which, what it was and is."""
    same = was.get("jax") == now.get("jax")
    lines = []
    before, after = dict(_figures(was)), dict(_figures(now))
    for name in dict.fromkeys((*before, *after)):
        if name == "jax" or (not same and name.startswith(_OF_ONE_VERSION)):
            continue
        tolerance = _tolerance(name, SAME_VERSION if same else OTHER_VERSION)
        old, new = before.get(name), after.get(name)
        if not _close(old, new, tolerance):
            lines.append(f"{name}: was {_text(old)}, is {_text(new)}{_change(old, new)}")
    return lines


def _figures(golden: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in golden.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _tolerance(name: str, tolerances: Mapping[str, float]) -> float:
    longest = max((start for start in tolerances if name.startswith(start)), key=len)
    return tolerances[longest]


def _close(old: Any, new: Any, tolerance: float) -> bool:
    if not tolerance or old is None or new is None:
        return old == new
    return abs(new - old) <= tolerance * max(abs(old), abs(new))


def _text(value: Any) -> str:
    if value is None:
        return "absent"
    return f"{value:,}" if type(value) in (int, float) else str(value)


def _change(old: Any, new: Any) -> str:
    if type(old) not in (int, float) or type(new) not in (int, float) or not old:
        return ""
    return f" ({(new - old) / old:+.1%})"


def readme_table(goldens: Mapping[str, Mapping[str, Any]]) -> str:
    """The expected plans as a Markdown table: run -> golden plan."""
    head = "| run | devices | parameters | state per device | peak per device | sent per step | "
    head += "predicted step | bound by |\n"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---|\n"]
    for name, plan in goldens.items():
        memory = plan["memory"]
        state = sum(memory[role] for role in STATE)
        compiled = "peak" in memory
        seconds = f"{plan['step_seconds']:.3g} s" if compiled else "not kept"
        cells = (
            f"`{name}`",
            f"{plan['gpus']:,} x {'cpu' if plan['target'] == CPU_TARGET.stem else plan['target']}",
            f"{plan['model_parameters'] / 1e9:.3g} B",
            bytes_text(state),
            bytes_text(memory["peak"]) if compiled else "not kept",
            f"{plan['volume']:.2f} x parameters",
            seconds,
            plan["bound"] if compiled else "not kept",
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)

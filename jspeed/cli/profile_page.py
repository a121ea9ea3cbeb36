"""What `jspeed profile` prints."""

from __future__ import annotations

from collections.abc import Iterator

from jspeed.engine.profile_run import ProfiledRun
from jspeed.profile.comms_page import bytes_text
from jspeed.profile.flops_page import amount, columns
from jspeed.profile.kinds import Kind
from jspeed.profile.peaks import peak_flops
from jspeed.profile.step_trace import ModuleTime
from jspeed.profile.tree import walk

_BUSY = tuple(kind for kind in Kind if kind is not Kind.IDLE)


def profile_page(run: ProfiledRun, *, depth: int) -> str:
    """The summary as text.

    Args:
      run: that was traced.
      depth: modules down to this depth are shown; -1: all.
    """
    parts = [list(_head(run)), _kinds(run), _modules(run, depth), _collectives(run), _files(run)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(run: ProfiledRun) -> Iterator[str]:
    trace, steps = run.trace, run.trace.steps
    seconds = trace.seconds / steps
    span = f"step {run.first}" if steps == 1 else f"steps {run.first} to {run.last}"
    before = ""
    if run.untraced_seconds is not None:
        before = f"; before the trace began, {1e3 * run.untraced_seconds:.2f} ms"
    yield f"{span} on {run.devices} x {run.device_kind}: {1e3 * seconds:.2f} ms per step{before}"
    rate = run.flops.total / seconds
    text = f"{amount(run.flops.total)} FLOP per step, {amount(rate, 'FLOP/s')}"
    peak = peak_flops(run.device_kind, run.compute_dtype)
    if peak is None:
        yield f'{text}; MFU unknown: no peak of "{run.device_kind}" is known'
    else:
        yield f"{text}; MFU {run.flops.of_model / (seconds * peak * run.devices):.1%}"
    if trace.unknown > 0.01:
        yield (
            f"{trace.unknown:.0%} of the busy time is of kernels that name no instruction of the "
            "train step"
        )


def _kinds(run: ProfiledRun) -> list[str]:
    step, steps = run.trace.step, run.trace.steps
    rows = [["kind", "ms per step", "share"]]
    for kind in Kind:
        seconds = step.seconds[kind]
        rows.append([kind.value, _ms(seconds / steps), f"{seconds / run.trace.seconds:.1%}"])
    rows.append(["all", _ms(run.trace.seconds / steps), "100.0%"])
    return [f"one device, mean of {run.trace.devices}", *columns(rows)]


def _modules(run: ProfiledRun, depth: int) -> list[str]:
    steps = run.trace.steps
    flops = {node.path: node.total for _, node in walk(run.flops.model) if node.name[0] != "("}
    rows = [["module", "ms per step", "share", *(kind.value for kind in _BUSY), "FLOP/s"]]
    for at, node in walk(run.trace.step):
        if 0 <= depth < at or (at == 1 and node.name == f"({Kind.IDLE.value})"):
            continue
        seconds = node.total / steps
        rows.append(
            [
                "  " * at + node.name,
                _ms(seconds),
                f"{node.total / run.trace.seconds:.1%}",
                *(_ms(node.seconds[kind] / steps) for kind in _BUSY),
                _rate(node, flops, run, seconds),
            ]
        )
    return columns(rows)


def _rate(node: ModuleTime, flops: dict[str, float], run: ProfiledRun, seconds: float) -> str:
    """FLOP/s of one device in a module's own time."""
    if node.name.startswith("(") or not flops.get(node.path) or not seconds:
        return "-"
    return amount(flops[node.path] / run.devices / seconds, "FLOP/s")


def _collectives(run: ProfiledRun) -> list[str]:
    if not run.trace.collectives:
        return []
    head = ["operation", "axes", "dtype", "calls", "bytes", "ms on the way", "algbw", "busbw"]
    rows = [head]
    for one in run.trace.collectives:
        bandwidths = ["-", "-", "-"]
        if one.seconds and one.algbw and one.busbw:
            bandwidths = [
                _ms(one.seconds),
                f"{amount(one.algbw, 'B/s')}",
                f"{amount(one.busbw, 'B/s')}",
            ]
        rows.append(
            [one.op, one.axis, one.dtype, f"{one.count:,}", bytes_text(one.bytes), *bandwidths]
        )
    return ["communication per step of one device, waiting for others included", *columns(rows)]


def _files(run: ProfiledRun) -> list[str]:
    lines = [f"XProf: xprof --logdir {run.path.parents[3]} (pip install xprof)"]
    if run.perfetto is not None:
        lines.append(f"Perfetto: open {run.perfetto} in https://ui.perfetto.dev")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}" if seconds else "-"

"""Traces of jax.profiler, as the CPU's and a GPU's tracer write them.

The GPU's is made by hand after what XLA's CUPTI tracer writes: no GPU was at hand.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jax.profiler import ProfileData

from jspeed.core.errors import JspeedError
from jspeed.profile.trace import WINDOW, TraceEvent, find_trace, read_trace

STATS = ("hlo_op", "hlo_module", "device_ordinal", "_p", "_c")


def plane(name: str, lines: dict[str, list[tuple[str, float, float, dict[str, str | int]]]]) -> str:
    """The text of a plane: line -> `(event, start, nanoseconds, stats)`."""
    names = sorted({event[0] for events in lines.values() for event in events})
    text = [f'name: "{name}"']
    for number, (line, events) in enumerate(lines.items()):
        inner = "".join(_event(names, *event) for event in events)
        text.append(f'lines {{ id: {number} name: "{line}" {inner} }}')
    for key, event in enumerate(names, start=1):
        text.append(f'event_metadata {{ key: {key} value {{ id: {key} name: "{event}" }} }}')
    for key, stat in enumerate(STATS, start=1):
        text.append(f'stat_metadata {{ key: {key} value {{ id: {key} name: "{stat}" }} }}')
    return f"planes {{ {' '.join(text)} }}\n"


def _event(
    names: list[str], name: str, start: float, length: float, stats: dict[str, str | int]
) -> str:
    values = "".join(
        f" stats {{ metadata_id: {STATS.index(key) + 1} "
        + (f'str_value: "{value}"' if isinstance(value, str) else f"int64_value: {value}")
        + " }"
        for key, value in stats.items()
    )
    return (
        f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {int(start * 1000)} "
        f"duration_ps: {int(length * 1000)}{values} }} "
    )


def write(tmp_path: Path, *planes: str) -> Path:
    path = tmp_path / "host.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace("".join(planes)))
    return path


def own(op: str, **more: str | int) -> dict[str, str | int]:
    return {"hlo_op": op, "hlo_module": "jit_step", **more}


def test_threads_of_a_cpu_and_what_ends_later(tmp_path: Path) -> None:
    host = plane(
        "/host:CPU",
        {
            "python": [(WINDOW, 100, 1000, {}), ("other", 0, 5000, {})],
            "tf_XLAEigen/1": [
                ("dot.1", 150, 50, own("dot.1", device_ordinal=0, _p=7)),
                ("end: dot.1", 200, 1, {"_c": 7}),
                ("all-reduce.2", 200, 10, own("all-reduce.2", device_ordinal=1, _p=8)),
                ("dot.1", 20, 30, own("dot.1", device_ordinal=0, _p=9)),
            ],
            "tf_XLAEigen/2": [("end: all-reduce.2", 400, 2, {"_c": 8})],
        },
    )
    trace = read_trace(write(tmp_path, host))
    assert (trace.start, trace.end, trace.seconds) == (100, 1100, 1e-6)
    assert trace.events == (  # the one before the window is left out
        TraceEvent(0, "dot.1", "jit_step", 150, 201),
        TraceEvent(1, "all-reduce.2", "jit_step", 200, 402),
    )


def test_streams_of_a_gpu_without_the_lines_that_repeat_them(tmp_path: Path) -> None:
    gpu = plane(
        "/device:GPU:3",
        {
            "Stream #14(Compute)": [("gemm_kernel", 10, 5, own("fusion.9"))],
            "Stream #22(MemcpyD2D)": [("MemcpyD2D", 12, 2, {})],
            "XLA Ops": [("fusion.9", 10, 5, own("fusion.9"))],
            "Steps": [("1", 0, 100, {})],
        },
    )
    host = plane("/host:CPU", {"python": [(WINDOW, 0, 50, {})]})
    assert read_trace(write(tmp_path, gpu, host)).events == (
        TraceEvent(3, "fusion.9", "jit_step", 10, 15),
        TraceEvent(3, "MemcpyD2D", "", 12, 14),
    )


def test_a_trace_without_the_steps_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(JspeedError, match=r"has no event 'jspeed\.profile', which marks"):
        read_trace(write(tmp_path, plane("/host:CPU", {"python": [("other", 0, 5, {})]})))
    broken = tmp_path / "broken.xplane.pb"
    broken.write_bytes(b"\xff\xfe nothing")
    with pytest.raises(JspeedError, match=r"broken\.xplane\.pb.*cannot be read as a trace"):
        read_trace(broken)


def test_the_newest_trace_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(JspeedError, match="holds no trace"):
        find_trace(tmp_path)
    for number, day in enumerate(("2026_01_02", "2026_01_01")):
        path = tmp_path / "plugins" / "profile" / day / "host.xplane.pb"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (number, number))
    assert find_trace(tmp_path).parent.name == "2026_01_01"

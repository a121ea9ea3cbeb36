"""Correctness and speed of the kernels on a GPU, beside cuDNN, torch and what the device can do.

    python -m benchmarks.gpu                 # any CUDA GPU, under 8 minutes
    python -m benchmarks.gpu --quick         # about 3 minutes
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --cpu-smoke --out /tmp/smoke

First all kernels are compared with dense fp32 and fp64 results on fresh random inputs, then times
are taken: on the device (CUPTI in JAX, events in torch; AdamW, which is donated its state, by the
wall clock over a full queue), medians, from inputs that together are larger than the L2 cache.
Peers that are not installed are skipped and named. Each section runs in a process of its own with a
time of its own, so that a section that fails, hangs or runs out of memory is a line of the table
and not the end, and JAX and torch never hold the GPU's memory together.

Writes `gpu-<kind>.json` and `gpu-<kind>.png` to `--out`. The status is 1 where a result is wrong, a
section failed or a target is missed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.on_gpu import roofline
from benchmarks.on_gpu.rows import Plan, Row, plan, read_rows
from benchmarks.on_gpu.targets import Comparison, comparisons
from benchmarks.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {
    "device": 30.0,
    "correctness": 110.0,
    "limits": 25.0,
    "attention": 125.0,
    "torch attention": 90.0,
    "adamw": 40.0,
    "torch adamw": 25.0,
    "rms_norm": 25.0,
}
"""Of each section; together under 8 minutes."""
_GRACE = 15.0
"""Seconds that a section may go on with a measurement it has begun, out of the whole time."""
WHOLE = 470.0


def main(
    quick: Annotated[bool, typer.Option(help="Fewer problems and repetitions.")] = False,
    cpu_smoke: Annotated[
        bool, typer.Option("--cpu-smoke", help="Tiny sizes, interpreted; times mean nothing.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of the inputs; fresh by default.")] = None,
    section: Annotated[list[str] | None, typer.Option(help="Only these sections.")] = None,
    out: Annotated[Path, typer.Option(help="Folder.")] = ROOT / "docs" / "performance",
) -> None:
    """Runs the sections, prints tables, writes JSON and a picture."""
    seed = secrets.randbelow(2**31) if seed is None else seed
    sizes = plan(seed, quick=quick, smoke=cpu_smoke)
    rows = run_sections(sizes, section or list(SECONDS))
    device = next((row for row in rows if row.section == "device" and row.status == "ok"), None)
    if device is None:
        print(tables(rows, []), file=sys.stderr)
        raise SystemExit(1)
    made = [] if cpu_smoke else comparisons(rows)
    title = f"{device.name}; {device.note}; seed {seed}"
    print(f"{title}\n\n{tables(rows, made)}")
    if cpu_smoke:
        print("\nA smoke test on a CPU: no time here means anything.")
    write(out, device, sizes, rows, made, title)
    wrong = any(row.status in ("wrong", "failed") for row in rows)
    raise SystemExit(int(wrong or any(one.verdict == "FAIL" for one in made)))


def run_sections(sizes: Plan, names: Sequence[str]) -> list[Row]:
    """Each section in a process, one after another, as long as there is time."""
    start, rows = time.monotonic(), []
    for name in dict.fromkeys(["device", *names]):
        left = WHOLE - (time.monotonic() - start) - _GRACE
        if left < 5:
            rows.append(Row(name, "all", "all", "skipped", note="the whole time was over"))
            continue
        found = run_section(name, sizes, min(SECONDS[name], left))
        rows += found
        if name == "device" and not any(row.status == "ok" for row in found):
            break
    return rows


def run_section(name: str, sizes: Plan, seconds: float) -> list[Row]:
    """The rows of a section; one more where its process ends badly."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "rows", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.on_gpu.child", name, str(path), str(seconds)]
        failure = ""
        with log.open("w") as output:
            try:
                status = subprocess.run(
                    command,
                    input=sizes.to_json(),
                    text=True,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=seconds + _GRACE,
                    cwd=ROOT,
                    env=_environment(name, sizes),
                    check=False,
                ).returncode
                if status:
                    lines = [line for line in log.read_text().splitlines() if line.strip()]
                    failure = f"status {status}: {lines[-1] if lines else ''}"[:200]
            except subprocess.TimeoutExpired:
                failure = f"stopped after {seconds + _GRACE:.0f} s"
        rows = read_rows(path)
    return [*rows, Row(name, "all", "all", "failed", note=failure)] if failure else rows


def _environment(name: str, sizes: Plan) -> dict[str, str]:
    # Kernels inside of CUDA graphs would be timed as one.
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_gpu_enable_command_buffer="]
    if sizes.smoke:
        # Mosaic's interpreter waits in threads of XLA's, of which there are as many as devices.
        flags.append("--xla_force_host_platform_device_count=8")
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": " ".join(flags).strip(),
    }
    if sizes.smoke or name.startswith("torch"):
        environment["JAX_PLATFORMS"] = "cpu"  # torch's processes use JAX for layouts only
    return environment


def tables(rows: Sequence[Row], made: Sequence[Comparison]) -> str:
    """What is printed: the rows, then the ratios."""

    def number(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    lines = [
        [
            f"{row.section}: {row.name}",
            row.problem,
            row.status,
            number(row.milliseconds, 3),
            number(row.spread, 3),
            number(row.tflops),
            number(row.gigabytes, 0),
            "" if row.error is None else f"{row.error:.1e}",
            row.clock,
            row.note,
        ]
        for row in rows
        if row.section != "device" or row.status != "ok"
    ]
    header = ["what", "on", "status", "ms", "spread", "TFLOP/s", "GB/s", "error", "clock", "note"]
    text = markdown_table(header, lines)
    if not made:
        return text
    ratios = [[one.what, number(one.ratio, 2), number(one.target, 2), one.verdict] for one in made]
    return f"{text}\n\n{markdown_table(['ratio', 'measured', 'target', ''], ratios)}"


def write(
    out: Path,
    device: Row,
    sizes: Plan,
    rows: Sequence[Row],
    made: Sequence[Comparison],
    title: str,
) -> None:
    """`gpu-<kind>.json` and the roofline beside it."""
    out.mkdir(parents=True, exist_ok=True)
    kind = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    record = {
        "device": device.name,
        "versions": device.note,
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
        "plan": dataclasses.asdict(sizes),
        "rows": [
            {**dataclasses.asdict(row), "tflops": row.tflops, "gigabytes": row.gigabytes}
            for row in rows
        ],
        "ratios": [{**dataclasses.asdict(one), "verdict": one.verdict} for one in made],
    }
    path = out / f"gpu-{kind}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nWritten: {path}")
    picture = path.with_suffix(".png")
    reason = roofline.draw(rows, title, picture)
    print(f"Written: {picture}" if not reason else f"No roofline: {reason}.")


if __name__ == "__main__":
    typer.run(main)

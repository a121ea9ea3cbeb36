from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from jspeed.engine.progress import (
    RemainingTime,
    TerminalDisplay,
    describe,
    describe_parts,
    duration_text,
    flops_text,
)

METRICS: dict[str, Any] = {
    "loss": 5.52104,
    "learning_rate": 1e-3,
    "tokens_per_second": 28432.4,
    "model_flops_per_second": 42.04e12,
    "memory_bytes": 1.5 * 2**30,
}
NUMBERS = "loss 5.5210  lr 1.0e-03  28,432 tok/s  42.0 TFLOP/s  1.5 GiB"


def test_the_numbers_of_a_step() -> None:
    assert describe(METRICS) == NUMBERS
    assert describe({"loss": None}) == "loss nan"
    rates = [flops_text(rate) for rate in (9.9e8, 1e9, 2.5e12, 1.25e15)]
    assert rates == ["990.0 MFLOP/s", "1.0 GFLOP/s", "2.5 TFLOP/s", "1.2 PFLOP/s"]
    times = [duration_text(seconds) for seconds in (0, 59.6, 61, 3725, 360000)]
    assert times == ["0:00", "1:00", "1:01", "1:02:05", "100:00:00"]


def test_the_parts_of_a_step() -> None:
    assert describe_parts(METRICS) == ""
    parts = {"data_seconds": 0.00012, "train_seconds": 0.1034, "report_seconds": 0.0021}
    shown, file = display(terminal=False, width=80)
    shown.step(1, METRICS | parts | {"checkpoint_seconds": 0.0})
    shown.step(2, METRICS | parts | {"checkpoint_seconds": 1.5})
    first, second = file.getvalue().splitlines()
    assert first.endswith(f"{NUMBERS}  ETA -:--  (data 0.1 ms train 103.4 ms report 2.1 ms)")
    assert second.endswith("(data 0.1 ms train 103.4 ms report 2.1 ms checkpoint 1500.0 ms)")


def ticking(*times: float) -> Iterator[float]:
    return iter(times)


def test_the_time_that_remains_leaves_out_the_first_step() -> None:
    clock = ticking(100.0, 102.0, 110.0, 120.0)
    remaining = RemainingTime(21, lambda: next(clock))
    # A resumed run: step 11 is compiled, 12 takes two seconds, 13 with an evaluation eight.
    assert remaining.after(11) == "-:--"
    assert remaining.after(12) == "0:18"
    assert remaining.after(13) == "0:40"
    assert remaining.after(21) == "0:00"


def display(*, terminal: bool, width: int, every: int = 1) -> tuple[TerminalDisplay, io.StringIO]:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=width, color_system=None, legacy_windows=False
    )
    return TerminalDisplay(console, steps=200, start=0, every=every), file


@pytest.mark.parametrize(("width", "bar"), [(80, False), (100, True), (140, True)])
def test_everything_fits_on_one_line_of_a_terminal(width: int, bar: bool) -> None:
    shown, file = display(terminal=True, width=width)
    with shown:
        shown.step(120, METRICS)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue().replace("\r", "\n"))
    last = plain.rstrip().splitlines()[-1].rstrip()
    assert last.startswith("120/200 ")
    assert last.endswith(f"{NUMBERS}  ETA -:--")
    assert ("━" in last) is bar
    assert len(last) <= width


def test_a_file_gets_plain_whole_lines_now_and_then() -> None:
    shown, file = display(terminal=False, width=40, every=50)
    with shown:
        shown.say("resumed from [global_step9]")
        for step in (1, 2, 50, 51, 200):
            shown.step(step, {"loss": 1.0})
    lines = file.getvalue().splitlines()
    assert lines[0] == "resumed from [global_step9]"
    assert [line.split("  ")[:2] for line in lines[1:]] == [
        [f"step {step}/200", "loss 1.0000"] for step in (1, 50, 200)
    ]

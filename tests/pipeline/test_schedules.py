"""The tables against the papers: by hand for small pipelines, by property for many."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.core.errors import ConfigError
from jspeed.pipeline.cost import figures
from jspeed.pipeline.operations import Operation, Schedule
from jspeed.pipeline.schedules import FORWARD_ONLY, KINDS, make_schedule
from jspeed.pipeline.validate import validate
from tests.pipeline.drawing import drawn, schedules

many = settings(max_examples=100, deadline=None)


@pytest.mark.parametrize(
    ("kind", "stages", "microbatches", "chunks", "rows"),
    [
        (
            "gpipe", 2, 3, 1,
            ["F0 F1 F2 . . B0 B1 B2",
             ". F0 F1 F2 B0 B1 B2 ."],
        ),
        (  # a forward tick and a backward tick alternate once the pipeline is full
            "1f1b", 3, 4, 1,
            ["F0 F1 F2 . F3 . . B0 . B1 B2 B3",
             ". F0 F1 . F2 B0 F3 B1 . B2 B3 .",
             ". . F0 B0 F1 B1 F2 B2 F3 B3 . ."],
        ),
        (
            "interleaved-1f1b", 2, 2, 2,
            ["F0a F1a F0b F1b . . B0b B1b B0a B1a",
             ". F0a F1a F0b B0b F1b B1b B0a B1a ."],
        ),
        (  # 3 is no multiple of 2: one group of three, which fills the pipeline as well
            "interleaved-1f1b", 2, 3, 2,
            ["F0a F1a F2a F0b F1b . F2b B0b . B1b B2b B0a B1a B2a",
             ". F0a F1a F2a F0b B0b F1b B1b F2b B2b B0a B1a B2a ."],
        ),
        (  # every stage waits two ticks, S - 1
            "zb-h1", 3, 4, 1,
            ["F0 F1 F2 . . B0 W0 F3 B1 W1 B2 W2 B3 W3",
             ". F0 F1 . B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
             ". . F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"],
        ),
        (  # fewer microbatches than stages
            "zb-h1", 3, 1, 1,
            ["F0 . . . . B0 W0",
             ". F0 . . B0 W0 .",
             ". . F0 B0 W0 . ."],
        ),
        ("forward", 2, 3, 1, ["F0 F1 F2 .", ". F0 F1 F2"]),
        (  # a microbatch needs three ticks to come back to stage 0
            "forward", 3, 2, 2,
            ["F0a F1a . F0b F1b . .",
             ". F0a F1a . F0b F1b .",
             ". . F0a F1a . F0b F1b"],
        ),
        ("1f1b", 1, 2, 1, ["F0 B0 F1 B1"]),
    ],
)  # fmt: skip
def test_by_hand(kind: str, stages: int, microbatches: int, chunks: int, rows: list[str]) -> None:
    made = make_schedule(kind, stages=stages, microbatches=microbatches, chunks=chunks)
    assert drawn(made) == rows


def test_zb_h1_is_the_papers() -> None:
    """Qi et al. 2023, figure 3: 4 stages, 8 microbatches, three units of bubble on every stage."""
    schedule = make_schedule("zb-h1", stages=4, microbatches=8)
    assert schedule.ticks == 3 * 8 + 3
    assert [row.split().count(".") for row in drawn(schedule)] == [3, 3, 3, 3]
    # The last stage starts one F and one B after the other, and ends with the W it has put off.
    assert drawn(schedule)[3].startswith(". . . F0 B0 F1 B1 F2 B2 F3 B3 W0 F4")
    assert drawn(schedule)[3].endswith("B7 W4 W5 W6 W7")


@many
@given(schedules())
def test_every_table_is_valid_and_without_idle_ticks(schedule: Schedule) -> None:
    validate(schedule)
    assert schedule.table.dtype == np.int32
    operation = schedule.table[:, :, 0]
    assert (operation != Operation.IDLE).any(axis=1).all()
    assert not schedule.table[operation == Operation.IDLE].any()


@many
@given(schedules().filter(lambda made: made.kind != "zb-h1"))
def test_no_tick_mixes_a_forward_with_a_backward(schedule: Schedule) -> None:
    for tick in schedule.table[:, :, 0]:
        assert len(set(tick.tolist()) - {Operation.IDLE}) == 1


@many
@given(schedules().filter(lambda made: made.kind in ("gpipe", "1f1b", "interleaved-1f1b")))
def test_time_is_exactly_the_textbooks(schedule: Schedule) -> None:
    M, S, v = schedule.microbatches, schedule.stages, schedule.chunks
    found = figures(schedule)
    assert found.weighted_ticks == pytest.approx(3 * (M + (S - 1) / v), rel=1e-12)
    assert found.bubble == pytest.approx((S - 1) / (v * M + S - 1), abs=1e-12)


@many
@given(schedules("zb-h1"))
def test_zb_h1_waits_a_third_as_long(schedule: Schedule) -> None:
    M, S = schedule.microbatches, schedule.stages
    # With M < S the first microbatch's way there and back and the last stage's work bound it.
    assert schedule.ticks == (3 * M + S - 1 if M >= S else 2 * S + 2 * M - 1)
    if M >= S:
        found = figures(schedule)
        assert found.bubble == pytest.approx((S - 1) / (3 * M + S - 1), abs=1e-12)
        assert found.bubble == pytest.approx(found.textbook_bubble, abs=1e-12)


@many
@given(schedules())
def test_peaks_are_those_documented(schedule: Schedule) -> None:
    M, S, v = schedule.microbatches, schedule.stages, schedule.chunks
    largest_group = -(-M // max(1, M // S))
    expected = {
        "gpipe": [M] * S,
        "1f1b": [min(M, 2 * (S - 1 - s) + 1) for s in range(S)],
        "interleaved-1f1b": [
            min(v * M, (v - 1) * largest_group + 2 * (S - 1 - s) + 1) for s in range(S)
        ],
        "zb-h1": [min(M, S)] * S,
        "forward": [0] * S,
    }
    assert list(figures(schedule).peak_live) == expected[schedule.kind]
    assert M % S or largest_group == max(S, M // max(1, M // S))


@pytest.mark.parametrize("kind", ["1f1b", "zb-h1"])
def test_memory_does_not_grow_with_microbatches(kind: str) -> None:
    peaks = {figures(make_schedule(kind, stages=4, microbatches=m)).peak_live for m in (8, 32, 64)}
    assert len(peaks) == 1


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 24))
@many
def test_the_last_chunk_goes_backward_right_after_its_forward(
    stages: int, chunks: int, microbatches: int
) -> None:
    """Else 1F1B would keep more than it needs."""
    microbatches = stages * -(-microbatches // stages)
    kind = "interleaved-1f1b" if chunks > 1 else "1f1b"
    made = make_schedule(kind, stages=stages, microbatches=microbatches, chunks=chunks)
    last = made.table[:, stages - 1].tolist()
    for m in range(microbatches):
        forward = last.index([Operation.FORWARD, m, chunks - 1])
        assert last[forward + 1] == [Operation.BACKWARD, m, chunks - 1]


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        (
            "zb-h2", {},
            '"pipeline.schedule": "zb-h2" is no schedule. Did you mean "zb-h1"? Known: gpipe, '
            "1f1b, interleaved-1f1b, zb-h1, forward.",
        ),
        (
            "pipedream", {},
            '"pipeline.schedule": "pipedream" is no schedule. Known: gpipe, 1f1b, '
            "interleaved-1f1b, zb-h1, forward.",
        ),
        ("1f1b", {"stages": 0}, '"mesh.pipe": 0 is no count. Use 1 or more.'),
        (
            "1f1b", {"microbatches": -3},
            '"gradient_accumulation_steps": -3 is no count. Use 1 or more.',
        ),
        ("1f1b", {"stages": True}, '"mesh.pipe": true is no count. Use 1 or more.'),
        ("forward", {"chunks": 1.5}, '"pipeline.chunks": 1.5 is no count. Use 1 or more.'),
        (
            "zb-h1", {"chunks": 2},
            '"pipeline.chunks": 2, but "zb-h1" has one chunk per stage. Use 1, or '
            '"pipeline.schedule": "interleaved-1f1b".',
        ),
        (
            "interleaved-1f1b", {"chunks": 1},
            '"pipeline.chunks": 1 leaves "interleaved-1f1b" nothing to interleave. Use 2 or more, '
            'or "pipeline.schedule": "1f1b".',
        ),
        (
            "interleaved-1f1b", {"chunks": 2, "microbatches": 3},
            '"gradient_accumulation_steps": 3 is fewer than "interleaved-1f1b" needs over 4 '
            'stages. Use 4 microbatches or more, at most 3 stages, or "pipeline.schedule": "1f1b".',
        ),
    ],
)  # fmt: skip
def test_wrong_requests(kind: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_schedule(kind, **{"stages": 4, "microbatches": 8, "chunks": 1} | sizes)
    assert str(raised.value) == message


def test_tables_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_schedule("1f1b", stages=2, microbatches=2).table[0, 0, 0] = 0


def test_long_schedules_are_made_quickly() -> None:
    for kind in (*KINDS, FORWARD_ONLY):
        chunks = 2 if kind == "interleaved-1f1b" else 1
        started = time.perf_counter()
        schedule = make_schedule(kind, stages=64, microbatches=512, chunks=chunks)
        validate(schedule)
        assert schedule.microbatches == 512
        assert time.perf_counter() - started < 60  # seconds where it is idle; a loop would be hours


def test_none_of_it_imports_jax() -> None:
    modules = "operations, packing, schedules, validate, cost, partition, picture"
    program = f"from jspeed.pipeline import {modules}; import sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

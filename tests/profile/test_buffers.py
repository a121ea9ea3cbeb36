"""What is alive at the peak: the union of places, not the sum of sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from jspeed.profile.buffers import LiveValue, Temporaries, read_temporaries

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4000, parameter 0, shape |f32[1000]| at ShapeIndex {}, maybe-live-out:
 value: <1 param @0> (size=4000,offset=0): f32[1000]{0}
allocation 7: size 10000, preallocated-temp:
 value: <2 zeros @0> (size=6000,offset=0): f32[1500]{0}
 value: <3 filled @0> (size=6000,offset=0): f32[1500]{0}
 value: <4 pair{1} @0> (size=2000,offset=6000): bf16[1000]{0}
 value: <5 while.3{2} (phi) @0> (size=1000,offset=8000): f32[250]{0}
 value: <6 later @0> (size=4000,offset=4000): f32[1000]{0}
Used values:
 value: <9 ignored @0> (size=90000,offset=0): f32[1000]{0}
"""
RANGES = """HloLiveRange (max 12):
  InstructionSequence:
    0:param
  BufferLiveRange:
    param{}:0-12
    zeros{}:1-4
    filled{}:4-6
    pair{1}:3-6
    while.3{2}:5-8
    later{}:7-9
  Live ranges at 4 (peak):
    zeros{}: 6000 bytes (cumulative: 6000 bytes)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m.gpu-buffer-assignment.txt").write_text(ASSIGNMENT)
    (tmp_path / "m.gpu-live-range.txt").write_text(RANGES)
    return tmp_path


def test_values_that_share_memory_count_once(folder):
    """At time 4 `zeros` and what it becomes are both alive, in one place; the peak is at 5."""
    temporaries = read_temporaries(folder)
    assert temporaries.peak == (5, 9000)
    assert temporaries.values_at(5) == (
        LiveValue("filled", (), 6000, "f32[1500]{0}"),
        LiveValue("pair", (1,), 2000, "bf16[1000]{0}"),
        LiveValue("while.3", (2,), 1000, "f32[250]{0}"),
    )


def test_of_several_programs_the_largest_counts(folder):
    (folder / "small.gpu-buffer-assignment.txt").write_text("BufferAssignment:\n")
    (folder / "small.gpu-live-range.txt").write_text("HloLiveRange (max 0):\n")
    values = read_temporaries(folder).values_at(5)
    assert [value.name for value in values] == ["filled", "pair", "while.3"]


def test_no_reports_are_no_error(tmp_path):
    assert read_temporaries(tmp_path) == Temporaries()

"""Host memory holds the buffers, whatever the state's size: watched from outside, in a child."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MB = 10**6


def run(kind: str, folder: Path, **figures: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.offload.bounded_child", kind, str(folder)]
    command += [str(figures[name]) for name in ("chunks", "elements", "buffers", "room")]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def peak_of(done: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """Resident bytes before the store was made, and their peak."""
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["before"], found["peak"]


def check(folder: Path, *, chunks: int, elements: int, buffers: int, beyond: int) -> None:
    """On disk the state costs its buffers and some chunks in flight; in memory, all of it."""
    state, held = chunks * elements * 12, buffers * elements * 12
    figures = {"chunks": chunks, "elements": elements, "buffers": buffers, "room": held + beyond}
    assert held + beyond < state / 2, "the test would show nothing"

    before, peak = peak_of(run("files", folder, **figures))
    assert peak < before + held + beyond
    assert list(folder.iterdir()) == []

    done = run("host", folder, **figures)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr, done.stderr
    before, peak = peak_of(run("host", folder, **{**figures, "room": 2 * state + 500 * MB}))
    assert peak > before + state


def test_a_state_of_200_mb(tmp_path: Path) -> None:
    check(tmp_path, chunks=68, elements=250_000, buffers=4, beyond=70 * MB)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_state_of_3_gb(tmp_path: Path) -> None:
    chunks, elements, buffers = 63, 4_000_000, 4
    check(tmp_path, chunks=chunks, elements=elements, buffers=buffers, beyond=300 * MB)
    figures = {"chunks": chunks, "elements": elements, "buffers": buffers, "room": 10**12}
    before, peak = peak_of(run("files", tmp_path, **figures))
    assert peak < before + buffers * elements * 12 + 300 * MB

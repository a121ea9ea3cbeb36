"""The comparison of disk tiers runs, and its table says what ran."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import disk_tier
from jspeed.offload import checksums


def test_the_table(tmp_path: Path) -> None:
    if shutil.which("dd") is None:
        pytest.skip("no dd")
    app = disk_tier.typer.Typer()
    app.command()(disk_tier.main)
    options = [str(tmp_path), "--chunks", "8", "--elements", "5000", "--rounds", "1"]
    done = CliRunner().invoke(app, options, catch_exceptions=False)
    assert done.exit_code == 0
    assert f"checksum where none is named: {checksums.fastest_checksum().name}" in done.output
    rows = re.findall(r"^\| (\w.*?) +\| +([\d.]+) \|", done.output, re.MULTILINE)
    speeds = {name: float(speed) for name, speed in rows}
    assert len(speeds) == 11
    assert {"FileStore, 4 buffers", "TensorStore, direct"} <= set(speeds)
    assert list(tmp_path.iterdir()) == []

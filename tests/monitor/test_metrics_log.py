"""metrics.jsonl: one curve, whatever was killed or resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jspeed.core.errors import DataError
from jspeed.monitor import MetricsLog, read_metrics


def fill(path: Path, steps: range, *, first_step: int | None = None, loss: float = 1.0) -> None:
    log = MetricsLog(path, first_step=first_step)
    for step in steps:
        log.write(step, 8 * step, {"loss": loss})
    log.close()


def test_one_object_a_line_flushed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(
        3,
        24,
        {
            "loss": np.float32(0.5),
            "tokens": np.int64(7),
            "status": "ok",
            "eval_loss": None,
            "skipped": True,
        },
    )
    assert path.read_text() == (
        '{"step": 3, "samples": 24, "loss": 0.5, "tokens": 7, "status": "ok", '
        '"eval_loss": null, "skipped": true}\n'
    )
    log.write(4, 32, {"loss": float("nan"), "grad_norm": np.float32("inf"), "step": 99})
    assert json.loads(path.read_text().splitlines()[1]) == {
        "step": 4,
        "samples": 32,
        "loss": None,
        "grad_norm": None,
    }
    log.close()


def test_arrays_are_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError, match=r"metrics are scalars; got ndarray of shape \(2,\)"):
        log.write(0, 0, {"loss": np.zeros(2)})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_resuming_replaces_what_the_lost_run_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 8))
    fill(path, range(5, 10), first_step=5, loss=2.0)
    entries = read_metrics(path)
    assert [entry["step"] for entry in entries] == list(range(1, 10))
    assert [entry["loss"] for entry in entries] == [1.0] * 4 + [2.0] * 5
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b"\x00\x00\x00", b'{"step": 4}\xff', b"[1]"])
def test_torn_last_line_is_removed(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 4))
    path.write_bytes(path.read_bytes() + torn)
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]
    fill(path, range(4, 6))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_whole_line_without_its_line_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-1])
    fill(path, range(4, 5))
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("length", range(0, 60, 7))
def test_cut_anywhere_and_resumed_gives_one_curve(tmp_path: Path, length: int) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:length])
    whole = len(read_metrics(path))
    fill(path, range(whole + 1, 4), first_step=whole + 1)
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]


def test_damage_in_the_middle_is_reported_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    for action in (lambda: MetricsLog(path, first_step=3), lambda: read_metrics(path)):
        with pytest.raises(DataError) as error:
            action()
        assert str(error.value) == (
            f"{path}, line 2: not a metrics entry (a JSON object with an integer "
            '"step"). Remove the line, or move the file away.'
        )


def test_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such metrics file"):
        read_metrics(tmp_path / "none.jsonl")


def test_killed_writer_loses_no_finished_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys\n"
        "from jspeed.monitor import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "for step in range(5): log.write(step, step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1, 2, 3, 4]


def test_the_room_needs_no_jax() -> None:
    code = "import sys, jspeed.monitor; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

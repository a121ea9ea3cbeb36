"""A sweep from candidates to files, with workers that plan by a formula."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.planner.pool import Ending
from jspeed.planner.sweep import Row, RunFile, SweepResult, SweepSettings, run_sweep
from jspeed.planner.sweep.output import default_folder, write_best, write_results
from jspeed.planner.sweep.picture import draw
from jspeed.planner.sweep.result import Pruned
from jspeed.planner.sweep.store import FILE, Store
from tests.planner.sweep.runs import cluster, run_file

FAKE = (sys.executable, "-m", "tests.planner.sweep.fake_planner")


class Notes:
    """What a watcher is told; stops the sweep after so many rows."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.total = self.reused = 0
        self.rows: list[Row] = []
        self.passes: list[Pruned] = []
        self._stop_after = stop_after

    def started(self, total: int, reused: int) -> None:
        self.total, self.reused = total, reused

    def compiled(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.rows) == self._stop_after:
            raise KeyboardInterrupt

    def passed(self, pruned: Pruned) -> None:
        self.passes.append(pruned)


def sweep(
    folder: Path, notes: Notes | None = None, *, run: RunFile | None = None, **settings: Any
) -> SweepResult:
    store = Store(folder)
    try:
        return run_sweep(
            run or run_file(),
            cluster(),
            SweepSettings(target="h200", command=FAKE, **settings),
            store,
            notes or Notes(),
        )
    finally:
        store.close()


def test_every_candidate_is_a_row_and_errors_are_rows_too(tmp_path: Path) -> None:
    notes = Notes()
    result = sweep(tmp_path, notes)
    assert notes.total == len(result.rows) == len(notes.rows) == 4 * 3 * 2
    assert result.pruned == ()
    endings = [row.ending for row in result.rows]
    assert endings.count(Ending.ABORTED) == 3
    assert endings.count(Ending.REFUSED) == 2
    aborted = next(row for row in result.rows if row.ending is Ending.ABORTED)
    assert aborted.error.endswith("Check failed: ok (0 vs. 1)")
    assert result.best is not None
    assert result.best.candidate.label == "data 8, stage 2, microbatch 4 x 1"
    assert result.best.plan is not None
    assert result.best.plan["seen"] == ["h200", 8, 8]
    assert "suggestions" not in result.best.plan
    assert [row.fits for row in result.rows] == sorted(
        (row.fits for row in result.rows), reverse=True
    )


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Notes(stop_after=9)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, first)
    lines = (tmp_path / FILE).read_bytes()
    assert len(lines.splitlines()) == 9
    second = Notes()
    result = sweep(tmp_path, second)
    assert (second.reused, second.total, result.reused) == (9, 15, 9)
    assert len(second.rows) == 15
    assert (tmp_path / FILE).read_bytes().startswith(lines)
    whole = sweep(tmp_path / "other")
    assert [row.key for row in whole.rows] == [row.key for row in result.rows]
    third = Notes()
    assert sweep(tmp_path, third).rows == result.rows
    assert (third.total, third.reused) == (0, 24)


def test_another_batch_or_cluster_is_compiled_anew(tmp_path: Path) -> None:
    sweep(tmp_path)
    notes = Notes()
    sweep(tmp_path, notes, run=run_file(train_batch_size=16))
    assert (notes.reused, notes.total) == (0, 16)


def test_the_top_passes_over_what_cannot_enter_it(tmp_path: Path) -> None:
    """On this cluster one microbatch of stage 3 alone takes longer than the fake's whole steps."""
    model = {**run_file().tree["model"], "layers": 4, "hidden_size": 8192, "heads": 64}
    run = run_file(
        model=model,
        train_batch_size=4096,
        sweep={"stages": [3], "remat": ["full"], "micro_batch_sizes": [1, 4, 16]},
    )
    notes = Notes()
    result = sweep(tmp_path, notes, run=run, top=1)
    assert [one.candidate.micro_batch_size for one in result.pruned] == [4, 1]
    assert notes.passes == list(result.pruned)
    assert all("best so far take" in one.reason for one in result.pruned)
    assert [row.candidate.micro_batch_size for row in result.rows] == [16]


def test_the_files(tmp_path: Path) -> None:
    run = run_file()
    result = sweep(tmp_path)
    written = json.loads(write_results(result, tmp_path).read_text())
    assert len(written["rows"]) == 24
    assert written["cluster"] == {"target": "h200", "gpus": 8, "gpus_per_host": 8}
    best = write_best(run, result, tmp_path)
    assert best is not None
    config = load_config(best)
    config.require_trainable()
    assert (config.zero.stage, config.batch.micro_batch_size, config.mesh.data) == (2, 4, 8)
    assert config.run is not None
    assert config.run.dir == str(tmp_path / "best")
    assert config.optimizer == run.config.optimizer
    picture = draw(result, tmp_path / "sweep.png", title="a sweep")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_that_fits_leaves_no_best_file_of_an_earlier_sweep(tmp_path: Path) -> None:
    result = sweep(tmp_path)
    run = run_file()
    assert write_best(run, result, tmp_path) is not None
    failed = [row for row in result.rows if not row.fits]
    none = SweepResult(result.cluster, 32, 100, failed, (), ())
    assert write_best(run, none, tmp_path) is None
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize(
    ("changes", "folder"),
    [
        ({}, "runs/sweep-tiny"),
        ({"sweep": {"output": "there"}}, "there"),
        ({"autotuning": {"results_dir": "tuned"}}, "tuned"),
        ({"run": None, "data": None}, "runs/sweep-mine"),
    ],
)
def test_where_results_go(changes: dict[str, Any], folder: str) -> None:
    assert default_folder(run_file(**changes), "files/mine.json") == Path(folder)

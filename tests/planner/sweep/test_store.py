"""Finished rows survive a kill, and belong to one configuration, cluster and version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jspeed.core.errors import DataError
from jspeed.planner.pool import Ending
from jspeed.planner.sweep.store import FILE, Store, installed_versions, row_key
from tests.planner.sweep.runs import cluster, run_file


def entry(ending: Ending = Ending.DONE, **more: Any) -> dict[str, Any]:
    return {"ending": ending.value, "plan": None, "error": "", "seconds": 1.0, **more}


def filled(directory: Path) -> Path:
    store = Store(directory)
    store.add("a", entry(plan={"fits": True}))
    store.add("b", entry(Ending.ABORTED, error="SIGABRT"))
    store.close()
    return directory / FILE


def test_rows_are_there_again(tmp_path: Path) -> None:
    filled(tmp_path)
    store = Store(tmp_path)
    first, second = store.get("a"), store.get("b")
    assert first is not None
    assert second is not None
    assert first["plan"] == {"fits": True}
    assert second["error"] == "SIGABRT"
    assert store.get("c") is None


@pytest.mark.parametrize("torn", [b'{"key": "c", "end', b'{"key": "c", "end\n', b"\xff\xfe\n"])
def test_a_torn_last_line_is_dropped_and_writing_goes_on(tmp_path: Path, torn: bytes) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    store = Store(tmp_path)
    assert path.read_bytes() == whole
    store.add("c", entry())
    store.close()
    assert path.read_bytes().startswith(whole)
    assert Store(tmp_path).get("c") is not None
    assert Store(tmp_path).get("b") is not None


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[1])
    with pytest.raises(
        DataError, match=r"line 2 is damaged. Remove it, or start anew with --fresh"
    ):
        Store(tmp_path)


def test_fresh_forgets(tmp_path: Path) -> None:
    filled(tmp_path)
    assert Store(tmp_path, fresh=True).get("a") is None


@pytest.mark.parametrize("ending", [Ending.TIMEOUT, Ending.MEMORY, Ending.FAILED])
def test_what_may_go_better_is_tried_again(tmp_path: Path, ending: Ending) -> None:
    store = Store(tmp_path)
    store.add("a", entry(ending))
    assert store.get("a") is None
    store.add("a", entry())
    assert store.get("a") is not None


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be kept there .* with --output DIR"):
        Store(tmp_path / "file")


def test_a_key_is_of_the_step_the_cluster_and_the_versions() -> None:
    config = run_file().config
    key = row_key(config, cluster())
    assert len(key) == 16
    assert key == row_key(run_file(run={"dir": "other", "steps": 7}).config, cluster())
    assert key == row_key(run_file(sweep={"stages": [1]}).config, cluster())
    other = [
        row_key(run_file(train_batch_size=64).config, cluster()),
        row_key(run_file(gradient_clipping=0.5).config, cluster()),
        row_key(config, cluster(16)),
        row_key(config, cluster(8, per_host=4)),
        row_key(config, cluster(limit=10**9)),
        row_key(config, cluster(), {**installed_versions(), "jax": "0.0"}),
    ]
    assert len({key, *other}) == 7

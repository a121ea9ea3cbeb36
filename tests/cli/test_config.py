from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.cli.processes import command, environment, jspeed, tiny_run, write


def test_json_has_values_sources_and_treatments(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", tiny_run(tmp_path))
    ran = jspeed("config", path, "--set", "gradient_clipping=0.5", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["config"]["train_batch_size"] == 4
    assert found["trainable"] is True
    keys = {key["path"]: key for key in found["keys"]}
    clipping = keys["gradient_clipping"]
    assert (clipping["value"], clipping["source"]) == (0.5, "override")
    assert clipping["treatment"] == "mapped"
    assert keys["zero_optimization.stage"]["source"] == "file"


def test_the_table_is_not_folded_where_there_is_no_terminal(tmp_path: Path) -> None:
    ran = jspeed("config", write(tmp_path / "run.json", tiny_run(tmp_path)))
    assert ran.code == 0
    assert "zero_optimization.stage3_param_persistence_threshold" in ran.out
    assert "run.dir" in ran.out


def test_it_is_quick_and_imports_no_jax(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", tiny_run(tmp_path))
    seconds = []
    for extra in ([], ["--json"], []):
        process = subprocess.Popen(
            command("config", path, *extra), stdout=subprocess.DEVNULL, env=environment()
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        # The processor's time: on a busy machine the clock's says little.
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.5, seconds
    ran = jspeed("config", path, PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in ran.err.splitlines()}
    assert "jspeed.config.load" in imported
    assert not imported & {"jax", "jaxlib", "flax", "optax", "numpy", "orbax.checkpoint"}

"""What only one process of a run sees, all of them act on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.processes import jspeed

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from pathlib import Path
import jax
import jspeed
from jspeed.checkpoint import checksums, folders
from jspeed.checkpoint.manifest import damaged_checkpoint
from jspeed.core.errors import CheckpointError
from tests.launch.curves_child import make_engine, own_batches

folder = Path(sys.argv[1])
engine, found = make_engine(1), {}
for batch in own_batches(engine, 2):
    engine.train_batch(batch)
    engine.save_checkpoint(folder / "saved", wait=True)

if jax.process_index() == 1:
    real = checksums.verify_files
    def verify(where, manifest):
        if manifest.tag == "global_step2":
            raise damaged_checkpoint(manifest.tag, where, ["seen by one process alone"])
        real(where, manifest)
    checksums.verify_files = verify
found["loaded"] = engine.load_checkpoint(folder / "saved")[0]

begin = folders.begin
def full(directory, tag):
    raise OSError(28, "No space left on device")
folders.begin = full  # which process 0 alone calls
try:
    engine.save_checkpoint(folder / "saved", "third")
except CheckpointError as error:
    found["failed"] = str(error)
folders.begin = begin
engine.save_checkpoint(folder / "saved", "third", wait=True)
found["tags"] = sorted(path.name for path in (folder / "saved").iterdir())
(folder / f"{jax.process_index()}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_damage_and_failures_that_one_process_sees(tmp_path):
    """All take the older checkpoint; all know that a save did not begin, and the next one works."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = jspeed(
        *("launch", "--num_procs", "2", str(script), str(tmp_path)),
        timeout=300,
        PYTHONPATH=paths,
        JAX_PLATFORMS="cpu",
    )
    assert ran.code == 0, ran.all
    assert 'Taking the one before it: "global_step1"' in ran.all
    for process in range(2):
        found = json.loads((tmp_path / f"{process}.json").read_text())
        assert found["loaded"] == "global_step1"
        assert 'Saving checkpoint "third"' in found["failed"]
        assert found["tags"] == ["global_step1", "global_step2", "latest", "third"]

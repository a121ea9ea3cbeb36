"""`jspeed elastic`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.processes import jspeed, write

RUN = {"elasticity": {"enabled": True, "max_train_batch_size": 64, "micro_batch_sizes": [2, 4]}}


def test_the_batch_and_the_numbers_of_devices_are_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "ds_config.json", RUN)
    ran = jspeed("elastic", path)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "batch: 48 rows\ndevices: 1, 2, 3, 4, 6, 8, 12, 24\n"
    ran = jspeed("elastic", path, "--world-size", "6", "--set", "elasticity.max_gpus=10")
    assert ran.out == (
        "batch: 48 rows\ndevices: 1, 2, 3, 4, 6, 8\n"
        "on 6: microbatches of 4, 2 for each step\n"
    )  # fmt: skip


def test_json(tmp_path: Path) -> None:
    ran = jspeed("elastic", write(tmp_path / "ds_config.json", RUN), "-w", "4", "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == {
        "train_batch_size": 48,
        "gpu_counts": [1, 2, 3, 4, 6, 8, 12, 24],
        "micro_batch_size": 4,
        "accumulation": 3,
    }


def test_failures_are_one_message(tmp_path: Path) -> None:
    path = write(tmp_path / "ds_config.json", RUN)
    ran = jspeed("elastic", path, "--world-size", "5")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        'jspeed: "elasticity": 5 devices cannot share the batch of 48 rows that it chose. Start '
        "one of these numbers: 1, 2, 3, 4, 6, 8, 12, 24.\n"
    )
    ran = jspeed("elastic", write(tmp_path / "plain.json", {"train_batch_size": 8}))
    assert ran.code == 2
    assert ran.err.startswith('jspeed: "elasticity": it is off.')

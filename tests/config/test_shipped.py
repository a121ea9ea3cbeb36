"""The run files in `configs/` resolve to the committed dumps.

After a meant change, `JSPEED_WRITE_GOLDEN=1 python -m pytest tests/config/test_shipped.py` writes
the dumps anew; the difference is reviewed like code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.config.report import config_as_json

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("**/*.json"))
DUMPS = Path(__file__).parent / "resolved" / "shipped"


def resolved(path: Path) -> dict[str, Any]:
    """What `jspeed config FILE --json` prints, its keys a line each.

    A key is shown where the file or another key sets it; what only defaults is in `config`.
    """
    report = config_as_json(load_config(path))
    report["keys"] = {
        row["path"]: f"{json.dumps(row['value'])} from {row['source']}, {row['treatment']}"
        for row in report["keys"]
        if row["source"] != "default"
    }
    return report


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_resolves_to_its_dump(path: Path) -> None:
    committed = DUMPS / path.relative_to(CONFIGS)
    if os.environ.get("JSPEED_WRITE_GOLDEN"):
        committed.parent.mkdir(parents=True, exist_ok=True)
        committed.write_text(json.dumps(resolved(path), indent=1) + "\n")
    assert committed.exists(), "no dump yet; JSPEED_WRITE_GOLDEN=1 writes it"
    assert resolved(path) == json.loads(committed.read_text())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_trains(path: Path) -> None:
    """Nothing in it is left open or not built yet."""
    report = config_as_json(load_config(path))
    assert report["trainable"], (report["later"], report["auto"])


def test_every_dump_has_its_file() -> None:
    assert {path.name for path in DUMPS.glob("**/*.json")} == {path.name for path in SHIPPED}

"""jspeed/config/report.py: what people and programs see, and what it costs to show it."""

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from jspeed.config import KEYS, load_config
from jspeed.config.report import config_as_json, key_table_markdown, render, report_rows

GOOD = Path(__file__).parent / "good"


def rendered(name: str, **options) -> str:
    out = io.StringIO()
    render(load_config(GOOD / name), Console(file=out, width=240), **options)
    return out.getvalue()


def row_of(text: str, path: str) -> str:
    return next(line for line in text.split("\n") if line.split(" ")[0] == path)


def test_the_table_shows_value_source_and_treatment():
    text = rendered("fp16_lamb.json")
    assert row_of(text, "zero_optimization.stage").split()[1:4] == ["1", "alias", "mapped"]
    assert row_of(text, "fp16.initial_scale_power").split()[1:4] == ["12", "file", "mapped"]
    assert row_of(text, "gradient_clipping").split()[1:4] == ["1.0", "default", "mapped"]
    assert row_of(text, "checkpoint.load_universal").split()[1:4] == ["true", "file", "automatic"]
    assert "Not built yet" not in text


def test_defaults_of_sections_that_are_off_are_left_out():
    text = rendered("gpt2_tiny.json")
    assert "fp16." not in text
    assert "csv_monitor" not in text
    assert "aio." not in text
    full = rendered("gpt2_tiny.json", everything=True)
    assert row_of(full, "aio.queue_depth").split()[1:4] == ["8", "default", "automatic"]


def test_later_features_and_open_autos_are_told_below():
    text = rendered("later_features.json")
    assert "Not built yet; training refuses this file until they are removed:" in text
    assert '"data_efficiency.enabled": true' in text
    assert (
        'Still "auto", resolved from the model when the engine is made: '
        "gradient_accumulation_steps, optimizer.params.lr"
    ) in rendered("zero2_offload.json")


def test_markup_in_values_is_printed_as_it_is():
    out = io.StringIO()
    config = load_config({"train_batch_size": 8, "wandb": {"enabled": True, "group": "[red]x[/]"}})
    render(config, Console(file=out, width=200))
    assert '"[red]x[/]"' in out.getvalue()


def test_json_holds_the_dump_and_a_row_per_key():
    config = load_config(GOOD / "later_features.json")
    report = json.loads(json.dumps(config_as_json(config)))
    assert report["config"] == config.to_dict()
    assert report["trainable"] is False
    assert len(report["later"]) == 12
    assert len(report["keys"]) == len(report_rows(config, everything=True)) > 400
    stage = next(row for row in report["keys"] if row["path"] == "zero_optimization.stage")
    assert stage == {
        "path": "zero_optimization.stage",
        "value": 3,
        "source": "file",
        "treatment": "mapped",
        "reason": "which of master, moments, grad and param are sharded",
    }
    assert config_as_json(load_config(GOOD / "gpt2_tiny.json"))["trainable"] is True
    assert config_as_json(load_config(GOOD / "zero3_auto.json"))["trainable"] is False


def test_the_markdown_table_has_every_key():
    text = key_table_markdown()
    rows = {line.split("`")[1] for line in text.split("\n") if line.startswith("| `")}
    for path in KEYS:
        head, _, name = path.partition(".params.")
        assert path in rows or (head in ("optimizer", "scheduler") and name in rows), path
    for line in text.split("\n"):
        if line.startswith("| ") and "meaning" not in line:
            assert len(line.replace("\\|", "").split("|")) in (4, 7), line
    assert "## `mesh` (jspeed's own)" in text
    assert "### WarmupCosineLR" in text


PROGRAM = """
import sys
from rich.console import Console
from jspeed.config import load_config
from jspeed.config.report import render
render(load_config(sys.argv[1]), Console(width=120))
print(sorted({"jax", "flax", "numpy", "pydantic"} & set(sys.modules)))
"""


def test_showing_a_file_imports_no_jax_and_is_quick():
    """Under half a second on an idle machine (0.2 s measured); the best of three tells."""
    seconds = []
    for _ in range(3):
        begin = _children_seconds()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(GOOD / "gpt2_tiny.json")],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(_children_seconds() - begin)
        assert done.stdout.strip().split("\n")[-1] == "[]"
    assert min(seconds) < 0.5


def _children_seconds() -> float:
    """CPU time of finished children, which other work on the machine hardly changes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

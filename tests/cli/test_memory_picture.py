"""Memory over a step: the picture is to scale, the text says what the picture shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jspeed.cli import memory_picture
from jspeed.cli.memory_picture import draw, rows
from jspeed.cli.plan_page import render
from jspeed.core.errors import MissingExtraError
from tests.cli.processes import jspeed, write
from tests.cli.test_plan import PLAN, RUN

matplotlib = pytest.importorskip("matplotlib.axes")
PNG = b"\x89PNG\r\n\x1a\n"
GIB = 2**30
LIVE: dict[str, Any] = {
    "instructions": 100,
    "roles": ["master weights", "activations", "gaps"],
    "peak_at": 40,
    "points": [
        {"at": 0, "origin": "embed", "bytes": [10 * GIB, 0, GIB]},
        {"at": 40, "origin": "blocks/mlp", "bytes": [10 * GIB, 20 * GIB, GIB]},
        {"at": 60, "origin": "loss", "bytes": [10 * GIB, 5 * GIB, GIB]},
    ],
    "holders": [
        {"bytes": 20 * GIB, "role": "activations", "type": "bf16[9]", "origin": "blocks/mlp"},
        {"bytes": 9 * GIB, "role": "master weights", "type": "f32[9]", "origin": "wte"},
    ],
}


@pytest.mark.parametrize(("limit", "lines"), [(40, [40.0]), (400, [])])
def test_roles_are_stacked_to_scale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, lines: list[float]
) -> None:
    drawn: list[Any] = []
    limits: list[float] = []
    original, line = matplotlib.Axes.stackplot, matplotlib.Axes.axhline

    def stackplot(self: Any, x: Any, y: Any, **style: Any) -> Any:
        drawn.append((x, y, style["labels"]))
        return original(self, x, y, **style)

    def axhline(self: Any, y: float, **style: Any) -> Any:
        limits.append(y)
        return line(self, y, **style)

    monkeypatch.setattr(matplotlib.Axes, "stackplot", stackplot)
    monkeypatch.setattr(matplotlib.Axes, "axhline", axhline)
    path = draw(LIVE, tmp_path / "new" / "memory.png", title="a", limit=limit * GIB)
    assert path.read_bytes().startswith(PNG)
    times, stacks, labels = drawn[0]
    assert times == [0, 40, 60, 100]
    assert stacks == [[10, 10, 10, 10], [0, 20, 5, 5], [1, 1, 1, 1]]
    assert labels == ["master weights", "activations", "gaps between temporaries"]
    assert limits == lines


def test_rows_are_the_worst_of_each_stretch() -> None:
    assert list(rows(LIVE)) == [
        (11 * GIB, "#" * 14, "master weights", "embed"),
        (31 * GIB, "#" * 40, "activations", "blocks/mlp"),
        (16 * GIB, "#" * 21, "master weights", "loss"),
    ]


def test_the_page_says_what_is_held_and_by_whom() -> None:
    console = Console(width=200, record=True)
    with console.capture() as captured:
        render({**PLAN, "live_bytes": LIVE, "memory_picture": "memory.png"}, console)
    lines = [line.split() for line in captured.get().splitlines()]
    assert ["33%", "31.0", "GiB", "#" * 40, "activations", "blocks/mlp"] in lines
    assert ["drawn", "in", "memory.png"] in lines
    assert ["9.0", "GiB", "f32[9]", "master", "weights", "wte"] in lines


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(memory_picture.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"a step's memory needs matplotlib.*\[plot\]"):
        draw(LIVE, tmp_path / "a.png", title="a", limit=GIB)


@pytest.mark.gpu_target
def test_the_command_draws_what_the_plan_says(tmp_path: Path) -> None:
    png = tmp_path / "memory.png"
    run = write(tmp_path / "run.json", RUN)
    ran = jspeed("plan", run, "--json", "--memory-picture", str(png))
    assert (ran.code, ran.err) == (0, "")
    plan = json.loads(ran.out)
    assert png.read_bytes().startswith(PNG)
    assert plan["memory_picture"] == str(png)
    points = plan["live_bytes"]["points"]
    assert max(sum(point["bytes"]) for point in points) == plan["memory"]["peak_bytes"]

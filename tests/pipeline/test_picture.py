"""Pictures of schedules are to scale."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from jspeed.core.errors import MissingExtraError
from jspeed.pipeline import picture
from jspeed.pipeline.cost import Costs
from jspeed.pipeline.picture import draw
from jspeed.pipeline.schedules import KINDS, make_schedule

matplotlib = pytest.importorskip("matplotlib.axes")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> dict[float, list[tuple[float, float]]]:
    """What is drawn: (start, width) of each stage's bars, by the bars' lower edge."""
    found: dict[float, list[tuple[float, float]]] = {}
    original = matplotlib.Axes.broken_barh

    def recording(self: Any, spans: Any, height: tuple[float, float], **style: Any) -> Any:
        found.setdefault(height[0], []).extend(spans)
        return original(self, spans, height, **style)

    monkeypatch.setattr(matplotlib.Axes, "broken_barh", recording)
    return found


@pytest.mark.parametrize(("kind", "chunks"), [("1f1b", 1), ("interleaved-1f1b", 2), ("zb-h1", 1)])
def test_bars_are_as_wide_as_operations_last(
    kind: str, chunks: int, bars: dict[float, list[tuple[float, float]]], tmp_path: Path
) -> None:
    schedule = make_schedule(kind, stages=3, microbatches=6, chunks=chunks)
    draw([schedule], tmp_path / "a.png", titles=["a"], costs=Costs(recompute=1))
    assert len(bars) == 3
    for spans in bars.values():
        assert sum(width for _, width in spans) == pytest.approx(6 * 4)  # all its work
        spans.sort()
        for (start, width), (following, _) in itertools.pairwise(spans):
            assert start + width <= following + 1e-9


def test_several_in_a_new_folder(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind != "interleaved-1f1b"]
    schedules = [make_schedule(kind, stages=2, microbatches=4) for kind in kinds]
    path = draw(schedules, tmp_path / "new" / "all.png", titles=kinds)
    assert path.read_bytes().startswith(PNG)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(picture.importlib, "import_module", missing)
    schedule = make_schedule("1f1b", stages=2, microbatches=4)
    with pytest.raises(MissingExtraError, match=r"Drawing a schedule needs matplotlib.*\[plot\]"):
        draw([schedule], tmp_path / "a.png", titles=["a"])

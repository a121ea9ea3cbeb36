"""The loss-curve picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jspeed.core.errors import DataError, MissingExtraError
from jspeed.monitor import plot_loss
from jspeed.monitor.plot import smoothed


def metrics(tmp_path: Path, entries: list[dict[str, object]]) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entries: list[dict[str, object]] = [{"step": i, "loss": 5.0 / (i + 1)} for i in range(100)]
    entries += [{"step": 50, "eval_loss": 0.2}, {"step": 100, "loss": None}]
    png = plot_loss(metrics(tmp_path, entries), tmp_path / "pictures" / "loss.png")
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (960, 540)
    flat: list[dict[str, object]] = [{"step": i, "loss": 5.0} for i in range(100)]
    assert plot_loss(metrics(tmp_path, flat), tmp_path / "flat.png").read_bytes() != content


def test_smoothing_keeps_constants_and_the_first_value() -> None:
    assert smoothed([3.0] * 200) == pytest.approx([3.0] * 200)
    assert smoothed([4.0, 2.0, 1.0]) == [4.0, 2.0, 1.0]  # short runs are not smoothed
    # 100 values are averaged with decay 1/2: weights 1/4 and 1/2 for the first two
    assert smoothed([4.0, 1.0] + [0.0] * 98)[1] == pytest.approx((0.25 * 4 + 0.5 * 1) / 0.75)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    path = metrics(tmp_path, [{"step": 1, "loss": None}, {"step": 2, "learning_rate": 0.1}])
    with pytest.raises(DataError) as error:
        plot_loss(path, tmp_path / "loss.png")
    assert str(error.value) == (
        f'{path}: no entry has a finite "loss" or "eval_loss", so there is no curve to draw.'
    )


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'pip install "jspeed\[plot\]"'):
        plot_loss(metrics(tmp_path, [{"step": 1, "loss": 1.0}]), tmp_path / "loss.png")

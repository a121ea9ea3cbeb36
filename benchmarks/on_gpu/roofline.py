"""A picture: rates over arithmetic intensity, under the two limits that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.rows import Row


def draw(rows: Sequence[Row], title: str, path: Path) -> str:
    """Writes a PNG; returns why not where it could not."""
    copy = next((row.gigabytes for row in rows if row.name == "copy" and row.gigabytes), None)
    product = next((row.tflops for row in rows if row.name == "matmul" and row.tflops), None)
    points = [row for row in rows if "attention" in row.section and row.tflops and row.bytes]
    if copy is None or product is None or not points:
        return "no limits or no points were measured"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensities = [2.0**i for i in range(4, 18)]
    roof = [min(product, copy * one / 1e3) for one in intensities]
    axes.loglog(intensities, roof, color="black", label="copy and large product, measured")
    for name in dict.fromkeys(row.name for row in points):
        own = [row for row in points if row.name == name]
        axes.loglog(
            [row.flops / row.bytes for row in own],
            [row.tflops for row in own],
            "o",
            label=name,
        )
        for row in own:
            at = (row.flops / row.bytes, row.tflops or 0.0)
            axes.annotate(row.problem, at, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(title=title, xlabel="FLOPs per least byte", ylabel="TFLOP/s")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return ""

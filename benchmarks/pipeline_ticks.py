"""Step times of a pipeline of two stages beside what its table's weighted ticks say.

    JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=2 \\
      --xla_cpu_multi_thread_eigen=false" python -m benchmarks.pipeline_ticks

Two virtual devices, each computing on one core at a time. The same model trains over 4, 8, 16 and
32 microbatches, in turns within one process. A table says how many forwards of a stage a step
lasts; time per such unit must be the same for every number of microbatches. Beside it the same
work without a pipeline, the batch split over the two devices: its time per microbatch is the unit
that a pipeline without any cost of its own would have. The status is 1 where a limit is passed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

import jspeed
from benchmarks import report
from benchmarks.interleave import Timings, alternate
from jspeed.models import GPT2Config, ModelFactory
from jspeed.nn import language_model_loss
from jspeed.pipeline import figures, make_schedule

LIMIT = 0.10
COUNTS = (4, 8, 16, 32)
SCHEDULES = ("1f1b", "gpipe", "zb-h1")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance" / "pipeline.md"
_WARM_UP = 2
# A vocabulary so small that the head, which only the last stage has, hardly counts.
VOCABULARY = 64


@dataclass(frozen=True)
class Size:
    """A GPT-2 of four layers, two per stage, and its microbatch of one row."""

    width: int
    sequence: int

    def __str__(self) -> str:
        return f"4 layers of width {self.width}, microbatches of 1 x {self.sequence} tokens"


SIZES = {"narrow": Size(128, 256), "wide": Size(256, 256)}


@dataclass(frozen=True)
class Row:
    """One number of microbatches.

    Attributes:
      microbatches: of a step.
      ticks: weighted, by the table.
      seconds: the median step.
      spread: of the middle half of the steps, relative to the median.
      error: of the step against weighted ticks times the common unit.
    """

    microbatches: int
    ticks: float
    seconds: float
    spread: float
    error: float


def engine(size: Size, *, microbatches: int, mesh: dict[str, int], schedule: str) -> Any:
    """An engine over two devices, and its step."""
    rows = microbatches * mesh.get("data", 1)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        layers=4,
        hidden_size=size.width,
        heads=4,
        sequence_length=size.sequence,
        intermediate_size=4 * size.width,
        attention="cpu",
        recompute=("activation",),
    )
    made = jspeed.initialize(
        model=ModelFactory("gpt2", config),
        loss_fn=language_model_loss,
        config={
            "train_batch_size": rows,
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
            "mesh": mesh,
            "pipeline": {"schedule": schedule},
        },
        devices=jax.devices()[:2],
        report=False,
    )
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (rows, size.sequence + 1), np.int32)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    def step() -> float:
        return float(made.train_batch(batch)["loss"])

    return step


def measure(size: Size, schedule: str, *, rounds: int) -> tuple[list[Row], float]:
    """The rows of a schedule, and its unit by that of the same work without a pipeline."""
    steps: dict[str, Callable[[], float]] = {}
    for count in COUNTS:
        mesh = {"pipe": 2, "data": 1}
        steps[str(count)] = engine(size, microbatches=count, mesh=mesh, schedule=schedule)
    for count in (COUNTS[1], COUNTS[-1]):
        mesh = {"data": 2}
        steps[f"data {count}"] = engine(size, microbatches=count, mesh=mesh, schedule="1f1b")
    for step in steps.values():
        for _ in range(_WARM_UP):
            step()
    timings = {timing.name: timing for timing in alternate(steps, rounds=rounds)}
    few, many = (timings[f"data {count}"].median() for count in (COUNTS[1], COUNTS[-1]))
    # One microbatch through four layers is two stages' forward and backward: six units.
    unit = (many - few) / (COUNTS[-1] - COUNTS[1]) / 6
    rows = as_rows(schedule, [timings[str(count)] for count in COUNTS])
    own = statistics.median(row.seconds / row.ticks for row in rows)
    return rows, own / unit


def as_rows(schedule: str, timings: Sequence[Timings]) -> list[Row]:
    """Medians beside the table's weighted ticks, with the unit that fits them all best."""
    ticks = [
        figures(make_schedule(schedule, stages=2, microbatches=count)).weighted_ticks
        for count in COUNTS
    ]
    units = [timing.median() / n for timing, n in zip(timings, ticks, strict=True)]
    unit = (min(units) + max(units)) / 2
    rows = []
    for count, n, timing in zip(COUNTS, ticks, timings, strict=True):
        low, median, high = statistics.quantiles(timing.seconds, n=4)
        rows.append(Row(count, n, median, (high - low) / median, median / (n * unit) - 1))
    return rows


def page(results: dict[tuple[str, str], tuple[list[Row], float]], rounds: int) -> str:
    """The measurement as Markdown."""
    lines = [
        "# Pipelines: time against the table",
        "",
        "A pipeline of two stages on two virtual CPU devices, a core each: the median step over 4,",
        "8, 16 and 32 microbatches beside the weighted ticks of its table (forward 1, backward 2,",
        "in forwards of a stage). *Error* is the step against ticks times one unit for all four",
        "rows; *spread* is the middle half of the steps by their median. The unit itself is given",
        "beside that of the same work without a pipeline, the batch split over the two devices.",
        "",
        f"Measured by `python -m benchmarks.pipeline_ticks --rounds {rounds}{_options(results)}` "
        "with the settings that its text names, on "
        f"{report.machine()}; {report.versions('jax', 'jaxlib')}.",
        "",
    ]
    for (size, schedule), (rows, ratio) in results.items():
        lines += [
            f"## {schedule}, {SIZES[size]}",
            "",
            report.markdown_table(
                ["microbatches", "weighted ticks", "median step", "spread", "error"],
                [
                    [
                        str(row.microbatches),
                        f"{row.ticks:g}",
                        f"{row.seconds * 1e3:.1f} ms",
                        f"{row.spread:.1%}",
                        f"{row.error:+.1%}",
                    ]
                    for row in rows
                ],
            ),
            "",
            f"The unit is {ratio:.2f} x that of the same work without a pipeline.",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _options(results: Iterable[tuple[str, str]]) -> str:
    """The command's options for sizes and schedules that are not all of them."""
    sizes, schedules = (dict.fromkeys(one[i] for one in results) for i in (0, 1))
    chosen = [f" --size {size}" for size in sizes if len(sizes) < len(SIZES)]
    chosen += [f" --schedule {kind}" for kind in schedules if len(schedules) < len(SCHEDULES)]
    return "".join(chosen)


def main(
    rounds: Annotated[int, typer.Option(help="Steps of each, in turns.")] = 20,
    size: Annotated[list[str] | None, typer.Option(help="narrow or wide; both.")] = None,
    schedule: Annotated[list[str] | None, typer.Option(help="1f1b, gpipe, zb-h1; all.")] = None,
    write: Annotated[bool, typer.Option(help="Write docs/performance/pipeline.md.")] = False,
) -> None:
    """Measures and prints; the status is 1 where time leaves the table by more than 10%."""
    if jax.device_count() < 2:
        sys.exit("jspeed: two devices are needed; see the head of this file for the settings.")
    results = {
        (one, kind): measure(SIZES[one], kind, rounds=rounds)
        for one in size or SIZES
        for kind in schedule or SCHEDULES
    }
    text = page(results, rounds)
    print(text)
    if write:
        PAGE.write_text(text)
    worst = max(abs(row.error) for rows, _ in results.values() for row in rows)
    print(f"largest error {worst:.1%}, limit {LIMIT:.0%}")
    sys.exit(1 if worst > LIMIT else 0)


if __name__ == "__main__":
    typer.run(main)

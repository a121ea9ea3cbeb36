"""What the engine costs beside a plain JAX loop, and what its Python costs per step.

    JAX_PLATFORMS=cpu python -m benchmarks.overhead

Both sides train the same model from the same weights on the same batch with AdamW and clipping, in
one process and in turns, and read the loss of each step. The status is 1 where a limit is passed.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from benchmarks import report
from benchmarks.interleave import Timings, alternate
from benchmarks.plain import PlainLoop
from benchmarks.shapes import SHAPES, Shape
from benchmarks.training import make_batch, make_engine
from jspeed.nn import language_model_loss

RATIO_LIMIT, PYTHON_LIMIT = 1.03, 1e-3
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance" / "cpu.md"
_WARM_UP = 3
_AGREEMENT = 1e-4
# So small that nothing but dispatch is left of a step.
_EMPTY = Shape(1, 16, 1, 64, 2, 8)


@dataclass(frozen=True)
class Ratio:
    """The engine's step beside the plain loop's, on one shape.

    Attributes:
      pairs: steps of each.
      plain_seconds, engine_seconds: medians.
      quartiles: of the ratios of the pairs; the middle one counts.
    """

    shape: str
    description: str
    pairs: int
    plain_seconds: float
    engine_seconds: float
    quartiles: tuple[float, float, float]

    @property
    def holds(self) -> bool:
        return self.quartiles[1] <= RATIO_LIMIT


@dataclass(frozen=True)
class PythonCost:
    """What `train_batch` takes beyond the call of the compiled step with a batch already in place.

    Attributes:
      pairs: steps of each kind.
      step_seconds: median of the compiled step of a model that is next to nothing.
      quartiles: of the differences of the pairs, in seconds; the middle one counts.
    """

    pairs: int
    step_seconds: float
    quartiles: tuple[float, float, float]

    @property
    def holds(self) -> bool:
        return self.quartiles[1] < PYTHON_LIMIT


def compare_with_plain_loop(shape: Shape, *, pairs: int, seed: int = 0) -> list[Timings]:
    """Steps of the engine and of the plain loop, in turns: `[engine, plain]`.

    Raises:
      RuntimeError: their losses are not the same, so that they do not do the same.
    """
    engine = make_engine(shape, stage=0, devices=1)
    plain = PlainLoop(engine.module, _mean_loss)
    batch = make_batch(shape, seed)

    steps = {
        "engine": lambda: float(engine.train_batch(batch)["loss"]),
        "plain": lambda: float(plain.train_batch(batch)),
    }
    for _ in range(_WARM_UP):
        ours, theirs = (step() for step in steps.values())
        if abs(ours - theirs) > _AGREEMENT * abs(theirs):
            raise RuntimeError(f"{shape}: the engine's loss is {ours}, the plain loop's {theirs}.")
    return alternate(steps, rounds=pairs)


def python_cost(*, pairs: int) -> list[Timings]:
    """`train_batch` and the compiled step alone, in turns: `[train_batch, compiled step]`."""
    engine = make_engine(_EMPTY, stage=0, devices=1)
    batch = make_batch(_EMPTY, 0)
    placed = engine.place_batch(batch)

    def compiled() -> float:
        engine.state, metrics = engine.train_step(engine.state, placed)
        return float(metrics["loss"])

    steps = {
        "train_batch": lambda: float(engine.train_batch(batch)["loss"]),
        "compiled step": compiled,
    }
    for step in list(steps.values()) * _WARM_UP:
        step()
    return alternate(steps, rounds=pairs)


def summarise_ratio(name: str, shape: Shape, timings: Sequence[Timings]) -> Ratio:
    """The figures of `compare_with_plain_loop`."""
    engine, plain = timings
    return Ratio(
        name,
        str(shape),
        len(engine.seconds),
        plain.median(),
        engine.median(),
        quartiles(engine.ratios_to(plain)),
    )


def summarise_python(timings: Sequence[Timings]) -> PythonCost:
    """The figures of `python_cost`."""
    whole, compiled = timings
    differences = [a - b for a, b in zip(whole.seconds, compiled.seconds, strict=True)]
    return PythonCost(len(differences), compiled.median(), quartiles(differences))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, middle, upper


def tables(ratios: Sequence[Ratio], python: PythonCost) -> str:
    """Both results in Markdown."""
    rows = [
        [
            ratio.shape,
            ratio.description,
            f"{1e3 * ratio.plain_seconds:.2f} ms",
            f"{1e3 * ratio.engine_seconds:.2f} ms",
            f"{ratio.quartiles[1]:.3f}",
            f"{ratio.quartiles[0]:.3f} to {ratio.quartiles[2]:.3f}",
            str(ratio.pairs),
        ]
        for ratio in ratios
    ]
    header = ["shape", "GPT-2", "plain loop", "engine", "ratio", "middle half", "pairs"]
    lower, middle, upper = (f"{1e3 * value:.2f}" for value in python.quartiles)
    return (
        f"{report.markdown_table(header, rows)}\n\n"
        f"The ratio is the median over pairs; it may be at most {RATIO_LIMIT}.\n\n"
        f"Python per step: {middle} ms (middle half {lower} to {upper} ms, {python.pairs} pairs, "
        f"the compiled step alone {1e3 * python.step_seconds:.2f} ms); "
        f"it must be under {1e3 * PYTHON_LIMIT:.0f} ms."
    )


def main(
    shape: Annotated[
        list[str], typer.Option(help=f"Which to time, any of {', '.join(SHAPES)}.")
    ] = ["small", "narrow", "base"],  # noqa: B006
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of steps per shape.")] = 100,
    python_pairs: Annotated[int, typer.Option(min=2, help="Pairs for the cost of Python.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help=f"Renew {PAGE.name}.")] = False,
) -> None:
    """Times the engine against a plain JAX loop."""
    unknown = [name for name in shape if name not in SHAPES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r}; expected one of {', '.join(SHAPES)}.")
    ratios = []
    for name in shape:
        _say(f"{name}: {SHAPES[name]}")
        timings = compare_with_plain_loop(SHAPES[name], pairs=pairs)
        ratios.append(summarise_ratio(name, SHAPES[name], timings))
    _say("Python per step")
    python = summarise_python(python_cost(pairs=python_pairs))
    text = f"{tables(ratios, python)}\n\nMeasured on {_setting()}."
    if as_json:
        print(json.dumps(_as_json(ratios, python), indent=2))
    else:
        print(text)
    if write:
        report.replace_section(PAGE, "overhead", text)
    if not (python.holds and all(ratio.holds for ratio in ratios)):
        raise typer.Exit(1)


def _mean_loss(model: Any, batch: Mapping[str, Any]) -> jax.Array:
    total, weight = language_model_loss(model, batch, jax.random.key(0))
    return total / weight


def _setting() -> str:
    device = jax.devices()[0]
    where = "" if device.platform == "cpu" else f"{device.device_kind}, "
    return f"{where}{report.machine()}; {report.versions('jax', 'flax', 'optax')}"


def _as_json(ratios: Sequence[Ratio], python: PythonCost) -> dict[str, Any]:
    return {
        "setting": _setting(),
        "ratio_limit": RATIO_LIMIT,
        "python_limit_seconds": PYTHON_LIMIT,
        "ratios": [{**asdict(ratio), "holds": ratio.holds} for ratio in ratios],
        "python": {**asdict(python), "holds": python.holds},
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    typer.run(main)

"""jspeed's step on a CPU beside DeepSpeed's: same GPT-2, same weights, same batch.

    python -m benchmarks.cpu_speed --peer-python peers/bin/python

Contestants are processes that take turns, one step each. All train in fp32 with AdamW, weight decay
and clipping, without dropout, on the same number of threads, and read the loss of each step; their
losses must agree. DeepSpeed lives in an environment of its own. The status is 1 where jspeed takes
more than 1.1 of DeepSpeed's time on the shape `base`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.contestants.common import arguments
from benchmarks.interleave import Contestant, ContestantError, Timings, race
from benchmarks.shapes import SHAPES

RATIO_LIMIT, DECIDING = 1.1, "base"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance" / "cpu.md"
PEER_VARIABLE = "JSPEED_PEERS_PYTHON"
OURS, PLAIN, PEER = "jspeed", "plain Flax", "DeepSpeed"
_AGREEMENT = 1e-3


class BenchmarkError(Exception):
    """A race that cannot be run, or whose result would mean nothing."""


@dataclass(frozen=True)
class PeerSetting:
    """A way to run DeepSpeed.

    Attributes:
      environment: variables.
      options: of the contestant `deepspeed_gpt2`.
    """

    environment: Mapping[str, str]
    options: Mapping[str, bool]


_PASSIVE = {"OMP_WAIT_POLICY": "passive"}
PEER_SETTINGS = {
    "passive": PeerSetting(_PASSIVE, {}),
    "default": PeerSetting({}, {}),
    "passive, torch_adam": PeerSetting(_PASSIVE, {"torch_adam": True}),
    "passive, eager": PeerSetting(_PASSIVE, {"eager": True}),
}


@dataclass(frozen=True)
class Race:
    """What one shape and seed took.

    Attributes:
      timings: one per contestant, in the order given.
    """

    shape: str
    seed: int
    timings: tuple[Timings, ...]

    def of(self, name: str) -> Timings:
        return next(one for one in self.timings if one.name == name)


def peer_contestant(
    python: str, shape: str, *, seed: int, threads: int, setting: str, name: str = PEER
) -> Contestant:
    """DeepSpeed in one of `PEER_SETTINGS`."""
    chosen = PEER_SETTINGS[setting]
    command = arguments(
        "deepspeed_gpt2", shape=shape, seed=seed, threads=threads, options=chosen.options
    )
    return Contestant(name, (python, *command), chosen.environment)


def jax_contestant(name: str, module: str, shape: str, *, seed: int, threads: int) -> Contestant:
    """A contestant of this environment."""
    command = arguments(module, shape=shape, seed=seed, threads=threads)
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return Contestant(name, (sys.executable, *command), environment)


def find_peer(python: str | None) -> str:
    """The Python that has DeepSpeed.

    Raises:
      BenchmarkError: there is none; says how to make one.
    """
    found = shutil.which(python) if python else None
    probe = "import importlib.util as u; assert u.find_spec('deepspeed') and u.find_spec('torch')"
    command = [found or "", "-c", f"{probe} and u.find_spec('transformers')"]
    if found and subprocess.run(command, capture_output=True).returncode == 0:
        return found
    what = f"{python} has no DeepSpeed" if found else f"{python or 'its Python'} was not found"
    raise BenchmarkError(
        f"--peer-python: DeepSpeed needs an environment of its own, but {what}. Make one with "
        "`python3 -m venv peers && peers/bin/pip install ninja torch transformers deepspeed` and "
        f"pass --peer-python peers/bin/python or set {PEER_VARIABLE}."
    )


def check_losses(timings: Sequence[Timings]) -> None:
    """Raises BenchmarkError unless every contestant's losses are the first one's, to rounding."""
    first = timings[0]
    for other in timings[1:]:
        for step, (a, b) in enumerate(zip(first.losses, other.losses, strict=True)):
            # Rounding grows with the steps: the beginning tells whether the work is the same.
            if step < 3 and abs(a - b) > _AGREEMENT * abs(a):
                raise BenchmarkError(
                    f"step {step}: {first.name} has loss {a}, {other.name} {b}; they do not train "
                    "the same model."
                )


def pooled_ratio(races: Sequence[Race], name: str, other: str) -> float:
    """The median ratio over all rounds of all seeds."""
    ratios = [ratio for one in races for ratio in one.of(name).ratios_to(one.of(other))]
    return statistics.median(ratios)


def tables(races: Sequence[Race]) -> str:
    """Results in Markdown: seconds per step, and ratios to DeepSpeed within rounds."""
    names = [PEER, OURS, PLAIN]
    header = ["shape", "GPT-2", "seed", *names, f"{OURS} / {PEER}", f"{PLAIN} / {PEER}"]
    rows = []
    for one in races:
        peer = one.of(PEER)
        rows.append(
            [
                one.shape,
                str(SHAPES[one.shape]),
                str(one.seed),
                *(f"{one.of(name).median():.3f} s" for name in names),
                *(f"{one.of(name).ratio_to(peer):.2f}" for name in (OURS, PLAIN)),
            ]
        )
    shapes = list(dict.fromkeys(one.shape for one in races))
    pooled = ", ".join(
        f"{shape} {pooled_ratio([r for r in races if r.shape == shape], OURS, PEER):.2f}"
        for shape in shapes
    )
    rounds = len(races[0].timings[0].seconds)
    return (
        f"{report.markdown_table(header, rows)}\n\n"
        f"Medians over {rounds} rounds. Over all seeds, jspeed / DeepSpeed: {pooled}. "
        f"The limit is {RATIO_LIMIT} on `{DECIDING}`."
    )


def settings_table(timings: Sequence[Timings]) -> str:
    """DeepSpeed's settings beside each other, in Markdown."""
    first = timings[0]
    rows = [
        [
            one.name,
            one.facts.get("optimizer", ""),
            f"{one.median():.3f} s",
            f"{statistics.median(one.cpu_seconds):.3f} s",
            f"{one.ratio_to(first):.2f}",
        ]
        for one in timings
    ]
    header = ["DeepSpeed", "optimizer", "step", "processor time", f"to {first.name!r}"]
    return report.markdown_table(header, rows)


def main(
    shape: Annotated[list[str], typer.Option(help=f"Any of {', '.join(SHAPES)}.")] = [  # noqa: B006
        "base",
        "narrow",
        "wide",
    ],
    seed: Annotated[list[int], typer.Option(help="Of weights and batch.")] = [0, 1],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each contestant.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Cores for each.")] = 2,
    peer_python: Annotated[
        str | None, typer.Option(envvar=PEER_VARIABLE, help="A Python that has DeepSpeed.")
    ] = None,
    setting: Annotated[
        str, typer.Option(help=f"DeepSpeed's: {'; '.join(PEER_SETTINGS)}.")
    ] = "passive",
    settings: Annotated[
        bool, typer.Option("--settings", help="Race DeepSpeed's settings instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help=f"Renew {PAGE.name}.")] = False,
) -> None:
    """Times jspeed, a plain Flax loop and DeepSpeed on the CPU."""
    _check_names(shape, setting)
    try:
        python = find_peer(peer_python)
        if settings:
            timings = _race_settings(python, shape[0], rounds=rounds, threads=threads)
            text = f"{settings_table(timings)}\n\n{_setting(shape[0], timings, threads)}"
            found = [_as_json(shape[0], 0, timings)]
            _finish(text, found, "settings", as_json, write)
            return
        races = [
            _race(python, name, one, rounds=rounds, threads=threads, setting=setting)
            for name in shape
            for one in seed
        ]
    except (BenchmarkError, ContestantError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    last = races[-1].timings
    text = f"{tables(races)}\n\n{_setting(f'DeepSpeed: {setting}', last, threads)}"
    found = [_as_json(one.shape, one.seed, one.timings) for one in races]
    _finish(text, found, "speed", as_json, write)
    deciding = [one for one in races if one.shape == DECIDING]
    if deciding and pooled_ratio(deciding, OURS, PEER) > RATIO_LIMIT:
        raise typer.Exit(1)


def _race(python: str, shape: str, seed: int, *, rounds: int, threads: int, setting: str) -> Race:
    print(f"{shape}, seed {seed}: {SHAPES[shape]}", file=sys.stderr, flush=True)
    contestants = [
        peer_contestant(python, shape, seed=seed, threads=threads, setting=setting),
        jax_contestant(OURS, "engine", shape, seed=seed, threads=threads),
        jax_contestant(PLAIN, "plain_flax", shape, seed=seed, threads=threads),
    ]
    return Race(shape, seed, tuple(_checked_race(contestants, rounds)))


def _check_names(shapes: Sequence[str], setting: str) -> None:
    for value, known in [*((name, SHAPES) for name in shapes), (setting, PEER_SETTINGS)]:
        if value not in known:
            raise typer.BadParameter(f"{value!r}; expected one of: {'; '.join(known)}.")


def _race_settings(python: str, shape: str, *, rounds: int, threads: int) -> list[Timings]:
    contestants = [
        peer_contestant(python, shape, seed=0, threads=threads, setting=setting, name=setting)
        for setting in PEER_SETTINGS
    ]
    return _checked_race(contestants, rounds)


def _checked_race(contestants: Sequence[Contestant], rounds: int) -> list[Timings]:
    with tempfile.TemporaryDirectory() as log:
        timings = race(contestants, rounds=rounds, log=Path(log))
    check_losses(timings)
    return timings


def _setting(what: str, timings: Sequence[Timings], threads: int) -> str:
    facts: dict[str, str] = {}
    for one in timings:
        facts |= {key: value for key, value in one.facts.items() if key != "first loss"}
    said = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "optimizer")
    return f"{what}. {threads} threads on {report.machine()}; {said}."


def _as_json(shape: str, seed: int, timings: Sequence[Timings]) -> dict[str, Any]:
    return {
        "shape": shape,
        "seed": seed,
        "contestants": [
            {
                "name": one.name,
                "facts": one.facts,
                "seconds": one.seconds,
                "cpu_seconds": one.cpu_seconds,
                "losses": one.losses,
                "ratio_to_first": one.ratio_to(timings[0]),
            }
            for one in timings
        ],
    }


def _finish(text: str, found: Any, section: str, as_json: bool, write: bool) -> None:
    print(json.dumps({"machine": report.machine(), "races": found}, indent=2) if as_json else text)
    if write:
        report.replace_section(PAGE, section, text)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    typer.run(main)

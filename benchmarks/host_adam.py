"""Adam on the host's cores: jspeed's engines beside DeepSpeed's CPUAdam and torch's fused AdamW.

    python -m benchmarks.host_adam --peer-python peers/bin/python

Contestants are processes that take turns, one update each, on the same numbers; the parameters they
arrive at must agree. DeepSpeed compiles its op with g++ and ninja when it first runs. The status is
1 where numba does fewer elements per second than the better of the peers, or XLA fewer than 0.6 of
that.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.contestants.host_adam_problem import arguments
from benchmarks.cpu_speed import PEER_VARIABLE, BenchmarkError, find_peer
from benchmarks.interleave import Contestant, ContestantError, Timings, race
from benchmarks.overhead import quartiles

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance" / "host-optimizer.md"
LIMITS = {"jspeed, numba": 1.0, "jspeed, XLA": 0.6}
PEERS = {"DeepSpeed CPUAdam": "deepspeed", "torch AdamW, fused": "torch"}
OURS = {
    "jspeed, numba": ("numba", False),
    "jspeed, XLA": ("xla", False),
    "jspeed, numba, bf16": ("numba", True),
    "jspeed, XLA, bf16": ("xla", True),
}
_AGREEMENT = 1e-5


def contestants(python: str, *, elements: int, threads: int) -> list[Contestant]:
    """All of them; `python` has DeepSpeed."""
    # Its compiler driver, ninja, is a program beside that Python.
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    peers = [
        Contestant(
            name,
            (python, *arguments("host_adam_torch", kind, elements=elements, threads=threads)),
            # Otherwise idle threads spin on, into the next contestant's turn.
            {"PATH": path, "OMP_WAIT_POLICY": "passive"},
        )
        for name, kind in PEERS.items()
    ]
    ours = [
        Contestant(
            name,
            (
                sys.executable,
                *arguments(
                    "host_adam_jspeed",
                    kind,
                    elements=elements,
                    threads=threads,
                    sixteen_bit=sixteen_bit,
                ),
            ),
            {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        for name, (kind, sixteen_bit) in OURS.items()
    ]
    return [*peers, *ours]


def check_agreement(timings: Sequence[Timings]) -> None:
    """Raises BenchmarkError unless all contestants have the first one's parameters, to rounding."""
    first = timings[0]
    for other in timings[1:]:
        for step, (a, b) in enumerate(zip(first.losses, other.losses, strict=True)):
            if abs(a - b) > _AGREEMENT * abs(a):
                raise BenchmarkError(
                    f"update {step}: the parameters of {first.name} sum to {a}, those of "
                    f"{other.name} to {b}; they do not do the same."
                )


def better_peer(timings: Sequence[Timings]) -> Timings:
    """The peer with the smaller median."""
    return min((one for one in timings if one.name in PEERS), key=Timings.median)


def speed_ratios(timings: Timings, peer: Timings) -> list[float]:
    """Elements per second by the peer's, round by round."""
    return peer.ratios_to(timings)


def holds(timings: Sequence[Timings]) -> bool:
    """Whether every engine reaches its limit."""
    peer = better_peer(timings)
    return all(
        statistics.median(speed_ratios(one, peer)) >= LIMITS[one.name]
        for one in timings
        if one.name in LIMITS
    )


def table(timings: Sequence[Timings], elements: int) -> str:
    """One size's results in Markdown."""
    peer = better_peer(timings)
    rows = []
    for one in timings:
        lower, middle, upper = quartiles(one.seconds)
        low, ratio, high = quartiles(speed_ratios(one, peer))
        rows.append(
            [
                one.name,
                f"{middle:.4f} s",
                f"{lower:.4f} to {upper:.4f}",
                f"{elements / middle / 1e9:.2f}",
                f"{elements / min(one.seconds) / 1e9:.2f}",
                f"{ratio:.2f}",
                f"{low:.2f} to {high:.2f}",
            ]
        )
    header = [f"{elements:.0e} elements".replace("+0", ""), "median", "middle half"]
    header += ["1e9 elements/s", "best", f"to {peer.name}", "middle half"]
    return report.markdown_table(header, rows)


def main(
    elements: Annotated[list[float], typer.Option(help="How many parameters.")] = [  # noqa: B006
        1e7,
        1e8,
    ],
    rounds: Annotated[int, typer.Option(min=2, help="Updates of each contestant.")] = 21,
    threads: Annotated[int, typer.Option(min=1, help="Cores for each.")] = 2,
    peer_python: Annotated[
        str | None, typer.Option(envvar=PEER_VARIABLE, help="A Python that has DeepSpeed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help=f"Renew {PAGE.name}.")] = False,
) -> None:
    """Times Adam on the host."""
    try:
        python = find_peer(peer_python)
        found = {
            int(count): _race(python, int(count), rounds=rounds, threads=threads)
            for count in elements
        }
    except (BenchmarkError, ContestantError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    text = "\n\n".join(table(timings, count) for count, timings in found.items())
    last = list(found.values())[-1]
    text += (
        f"\n\n{rounds} rounds, {threads} threads. Ratios of elements per second within a round; "
        f"the limits are {LIMITS['jspeed, numba']} for numba and {LIMITS['jspeed, XLA']} for XLA. "
        f"Measured on {report.machine()}; {_versions(last)}."
    )
    print(json.dumps(_as_json(found), indent=2) if as_json else text)
    if write:
        report.replace_section(PAGE, "speed", text)
    if not all(holds(timings) for timings in found.values()):
        raise typer.Exit(1)


def _race(python: str, elements: int, *, rounds: int, threads: int) -> list[Timings]:
    print(f"{elements} elements", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as log:
        timings = race(
            contestants(python, elements=elements, threads=threads), rounds=rounds, log=Path(log)
        )
    check_agreement(timings)
    return timings


def _versions(timings: Sequence[Timings]) -> str:
    facts: dict[str, str] = {}
    for one in timings:
        facts |= one.facts
    return ", ".join(f"{name} {version}" for name, version in facts.items())


def _as_json(found: dict[int, list[Timings]]) -> dict[str, Any]:
    return {
        "machine": report.machine(),
        "races": [
            {
                "elements": elements,
                "holds": holds(timings),
                "contestants": [
                    {
                        "name": one.name,
                        "facts": one.facts,
                        "seconds": one.seconds,
                        "cpu_seconds": one.cpu_seconds,
                        "speed_ratio": statistics.median(speed_ratios(one, better_peer(timings))),
                    }
                    for one in timings
                ],
            }
            for elements, timings in found.items()
        ],
    }


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    typer.run(main)

"""The claims of the DeepSpeed literature beside what compiled plans say of them.

    python -m benchmarks.claims

Compiles the real train step of each model for described GPUs, which takes some minutes and no GPU,
and writes `docs/claims.md`. That a claim does not hold is a result and no failure; the status is 1
where a run cannot be compiled.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from benchmarks.literature import CLAIMS, RUNS, Claim, Finding
from benchmarks.report import markdown_table
from jspeed.core.errors import JspeedError
from jspeed.planner.pool import Ending, run_jobs
from jspeed.planner.resources import worker_count, worker_memory
from jspeed.planner.suggest import Where

PAGE = Path(__file__).resolve().parent.parent / "docs" / "claims.md"
_TIMEOUT_SECONDS = 1800.0
_WIDTH = 116
_HEAD = """# Claims of the DeepSpeed literature, checked by the compiler

`python -m benchmarks.claims` writes this page. Each figure is of a real train step, compiled for
the GPUs named with JAX {jax} and without a GPU at hand (see [plan](plan.md)). Nothing here was run:
bytes and collectives are the compiler's. GB are 10⁹ bytes, Ψ is the number of parameters, N the
number of devices. A figure agrees where it is at most 5% worse than what is said; *ratio* is the
plan's figure against the literature's."""


def compiled_plans(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The plans of some of `RUNS` as JSON, by name.

    Raises:
      JspeedError: a run cannot be compiled.
    """
    jobs = [
        Where(asked.target, asked.gpus, 8).job(name, asked.config)
        for name, asked in RUNS.items()
        if name in names
    ]
    plans = {}
    for outcome in run_jobs(
        jobs,
        workers=worker_count(),
        timeout_seconds=_TIMEOUT_SECONDS,
        memory_limit_bytes=worker_memory(),
    ):
        if outcome.ending is not Ending.DONE:
            raise JspeedError(f"{outcome.key}: {outcome.error}")
        plans[outcome.key] = outcome.result
    return plans


def section(claim: Claim, findings: Sequence[Finding]) -> str:
    """One claim as Markdown."""
    rows = [
        (
            one.what,
            number(one.said, one.unit),
            number(one.found, one.unit),
            f"{one.found / one.said:.2f}",
            "yes" if one.holds else "**no**",
        )
        for one in findings
    ]
    table = markdown_table(("", "said", "plan", "ratio", "agrees"), rows)
    asked = RUNS[claim.runs[0]]
    where = f"{asked.target}, {asked.gpus:,} device{'s' if asked.gpus > 1 else ''}"
    title = f"## {claim.key[0].upper()}{claim.key[1:]}"
    source = f"*Source: {claim.source}. Compiled for: {where}.*"
    return "\n\n".join([title, _wrapped(claim.text), _wrapped(source), table, _wrapped(claim.why)])


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, break_on_hyphens=False)


def number(value: float, unit: str) -> str:
    """Three digits and the unit."""
    return f"{value:#.3g} {unit}".rstrip().replace(". ", " ").removesuffix(".")


def verdict(findings: Sequence[Finding]) -> str:
    agreeing = sum(one.holds for one in findings)
    if agreeing == len(findings):
        return "holds"
    return f"{agreeing} of {len(findings)} figures agree"


def page(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page."""
    judged = [(claim, claim.judge(plans)) for claim in CLAIMS]
    summary = markdown_table(
        ("claim", "verdict"), [(claim.key, verdict(findings)) for claim, findings in judged]
    )
    title, _, text = _HEAD.format(jax=jax.__version__).partition("\n\n")
    parts = [title, _wrapped(text), summary, *(section(*pair) for pair in judged)]
    return "\n\n".join(parts) + "\n"


def main(
    output: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
) -> None:
    """Compile, judge, write the page."""
    try:
        plans = compiled_plans(tuple(RUNS))
    except JspeedError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    text = page(plans)
    output.write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)

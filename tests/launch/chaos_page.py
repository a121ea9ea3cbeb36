"""The page of documentation that `tests.launch.chaos` writes."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # that one runs as a script
    from tests.launch.chaos import Comparison, Restart, Supervised


def chaos_page(
    options: argparse.Namespace, killed: Supervised, compared: Comparison, seconds: float
) -> str:
    """The page: what was killed when, what the launcher said of it, and how the losses compare.

    A restart that follows no kill stands there with all that the launcher said of it.

    Args:
      options: of the command line.
      killed: the run that was killed at.
      compared: its losses with those of the run that was left alone.
      seconds: that all of it took.
    """
    single = killed.kills[:-1]
    restarts = killed.restarts()
    told = dict(enumerate(restarts, 1))
    rows = [
        f"| {kill.restart} | {kill.after:.2f} s | {kill.whom} | {kill.doing} | {kill.step} "
        f"| {_said(told.pop(kill.restart, None))} |"
        for kill in killed.kills
    ]
    rows += [f"| {number} | - | nobody | - | - | {_said(one)} |" for number, one in told.items()]
    counts = ", ".join(
        f"{sum(kill.doing == doing for kill in single)} while {doing}"
        for doing in ("starting", "training", "saving")
    )
    half = options.processes // 2
    return f"""# Killed at random moments

```bash
python -m tests.launch.chaos --kills {options.kills} --processes {options.processes} \\
  --seed {options.seed} --steps {options.steps} --save_every {options.save_every} \\
  --write docs/chaos.md
```

A run of {options.processes} processes on two hosts (ZeRO-3, {options.steps} steps, a checkpoint
every {options.save_every}, [`elasticity`](elastic.md)) under `jspeed launch --elastic_training`;
both hosts are this machine, and its CPU computes. After each start one process is killed with
SIGKILL: which one, and when, is drawn at random over wall time, so that importing, compiling,
training and saving are hit alike. At last one host is lost with all of its processes, and the
others go on alone.
{options.kills} kills: {counts}; {len(restarts)} restarts; {seconds:.0f} s in all on
{os.cpu_count()} cores.

**With {options.processes} processes, {len(compared.differing)} of {compared.since} losses differ
from those of the run that was left alone**, compared to the last bit. **The other
{options.steps - compared.since}, with {half}, differ by at most {compared.furthest:.1e}** of their
value: the batch is the same, its microbatches are added up in another order. (The learning rate is
3e-4. At 3e-3 this model amplifies rounding: 1e-7 becomes 1e-4 within a hundred steps.)

| restart | after the start | killed | the run was | last step written | the launcher said |
|---:|---:|---|---|---:|---|
{chr(10).join(sorted(rows, key=_number))}
{"".join(map(_in_full, told.items()))}"""


def _number(row: str) -> int:
    return int(row.split()[1])


def _said(restart: Restart | None) -> str:
    if restart is None:
        return "(one restart for two failures)"
    return f"{restart.name}: {restart.reason[:200]}".replace("|", "\\|")


def _in_full(numbered: tuple[int, Restart]) -> str:
    number, restart = numbered
    return f"""
## Restart {number}, which follows no kill

```text
{restart.lines.rstrip()}
```
"""

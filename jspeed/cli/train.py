"""`jspeed train`."""

from __future__ import annotations

from collections.abc import Callable

import jax
from rich.console import Console

from jspeed.cli.failures import INTERRUPTED
from jspeed.config import Config
from jspeed.core.errors import JspeedError
from jspeed.engine.progress import Silent, TerminalDisplay
from jspeed.engine.run import RunResult, run_sections, train_run
from jspeed.monitor import plot_loss


def train_command(
    config: Config, *, resume: bool, overwrite: bool, terminated: Callable[[], bool]
) -> int:
    """Trains and returns the exit code: 0 when finished or preempted, 130 after Ctrl-C."""
    section = run_sections(config)[2]
    console = Console()
    if jax.process_index() == 0:
        every = config.steps_per_print or section.log_every
        display = TerminalDisplay(
            console,
            steps=section.steps,
            start=0,
            every=every,
            breakdown=config.wall_clock_breakdown,
        )
    else:
        display = Silent()
    try:
        result = train_run(
            config, display=display, resume=resume, overwrite=overwrite, terminated=terminated
        )
    except KeyboardInterrupt:
        console.print("stopped at once; what the latest checkpoint holds is safe.")
        return INTERRUPTED
    if jax.process_index() == 0:
        _farewell(result, console, steps=section.steps)
    return INTERRUPTED if result.state == "interrupted" else 0


def _farewell(result: RunResult, console: Console, *, steps: int) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)

    if result.state == "finished":
        say(f"finished at step {result.step}; metrics and checkpoints are in {result.directory}")
    else:
        say(
            f"{result.state} at step {result.step} of {steps}; the checkpoint is in "
            f"{result.directory}. Continue with --resume."
        )
    try:
        picture = plot_loss(result.directory / "metrics.jsonl", result.directory / "loss.png")
        say(f"loss curve: {picture}")
    except JspeedError as error:
        say(f"no loss curve drawn: {error}")

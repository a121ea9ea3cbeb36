"""The commands: train, explain, config.

Nothing here imports JAX before a command that needs it has prepared the environment, so that
`jspeed config` stays quick and a machine without a GPU driver shows nothing of its plugins.
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated

import typer

from jspeed import __version__
from jspeed.cli.environment import device_overrides, prepare_jax, prepare_jax_on_cpu
from jspeed.cli.interrupts import note_termination
from jspeed.config import load_config

app = typer.Typer(
    name="jspeed",
    help="Train Flax models larger than one device from one JSON file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[str, typer.Argument(metavar="RUN", help="A run file or ds_config.json.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as run.steps=10. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        jax, python = metadata.version("jax"), platform.python_version()
        typer.echo(f"jspeed {__version__} (JAX {jax}, Python {python})")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Train Flax models larger than one device from one JSON file."""
    del version


@app.command()
def train(
    run: RunFile,
    set_: Overrides = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Same as run.steps.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the latest checkpoint, if any.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the same folder.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices", min=1, help="Virtual CPU devices to train on; mesh.data follows."
        ),
    ] = None,
) -> None:
    """Train a model as a run file says."""
    with note_termination() as terminated:
        overrides = list(set_ or [])
        if steps is not None:
            overrides.append(f"run.steps={steps}")
        loaded = load_config(run, overrides=tuple(overrides))
        if devices is not None:
            overrides += device_overrides(loaded, devices)
            loaded = load_config(run, overrides=tuple(overrides))
        if loaded.model and loaded.data and loaded.run:
            # Now rather than after JAX is imported and a tokenizer trained.
            loaded.resolve_auto().require_trainable()
        prepare_jax(loaded, devices)
        from jspeed.cli.train import train_command

        code = train_command(loaded, resume=resume, overwrite=overwrite, terminated=terminated)
    raise typer.Exit(code)


@app.command()
def config(run: RunFile, set_: Overrides = None, json: AsJson = False) -> None:
    """Print the resolved configuration and what becomes of each key."""
    from jspeed.cli.config import config_command

    config_command(run, set_ or [], as_json=json)


@app.command()
def explain(
    run: RunFile,
    set_: Overrides = None,
    json: AsJson = False,
    devices: Annotated[
        int | None,
        typer.Option("--devices", min=1, help="Lay out for so many; mesh.data follows."),
    ] = None,
) -> None:
    """Print where every parameter would live, why, and its bytes."""
    prepare_jax_on_cpu()
    from jspeed.cli.explain import explain_command

    explain_command(run, set_ or [], as_json=json, devices=devices)

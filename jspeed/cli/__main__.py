"""`jspeed`: train, explain, config.

Nothing here imports JAX before a command that needs it has prepared the environment, so that
`jspeed config` stays quick and a machine without a GPU driver shows no plugin traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jspeed.cli.environment import mesh_devices, prepare_jax
from jspeed.cli.failures import guarded

app = typer.Typer(
    name="jspeed",
    help="Train Flax models larger than one device from one JSON file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

RunFile = Annotated[str, typer.Argument(metavar="RUN", help="A run file or ds_config.json.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as run.steps=10. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Devices = Annotated[
    int | None,
    typer.Option("--devices", min=1, help="Virtual CPU devices to use, where there is no GPU."),
]


@app.command()
def train(
    run: RunFile,
    set_: Overrides = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Same as run.steps.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the latest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the same folder.")
    ] = False,
    devices: Devices = None,
) -> None:
    """Train a model as a run file says."""
    overrides = list(set_ or [])
    if steps is not None:
        overrides.append(f"run.steps={steps}")
    from jspeed.config import load_config

    loaded = load_config(run, overrides=tuple(overrides))
    prepare_jax(devices or mesh_devices(loaded))
    from jspeed.cli.train import train_command

    raise typer.Exit(train_command(loaded, resume=resume, overwrite=overwrite))


@app.command()
def config(run: RunFile, set_: Overrides = None, json: AsJson = False) -> None:
    """Print the resolved configuration: each value, where it comes from, how it is treated."""
    from jspeed.cli.config import config_command

    config_command(run, set_ or [], as_json=json)


@app.command()
def explain(
    run: RunFile,
    set_: Overrides = None,
    json: AsJson = False,
    devices: Devices = None,
) -> None:
    """Print where every parameter would live, why, and its bytes per device. Needs no devices."""
    prepare_jax(None)
    from jspeed.cli.explain import explain_command

    explain_command(run, set_ or [], as_json=json, devices=devices)


def main() -> None:
    """The entry point of the `jspeed` command."""
    sys.exit(guarded(app))


if __name__ == "__main__":
    main()

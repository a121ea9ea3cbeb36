"""The commands: train, explain, config, elastic, targets, plan, sweep, profile, schedule, launch,
report, convert.

Nothing here imports JAX before a command that needs it has prepared the environment, so that
`jspeed config` stays quick and a machine without a GPU driver shows nothing of its plugins.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from json import dumps as as_json
from pathlib import Path
from typing import Annotated

import typer

from jspeed import __version__
from jspeed.cli.cluster import cluster_asked
from jspeed.cli.convert import convert_app
from jspeed.cli.environment import (
    device_overrides,
    prepare_jax,
    prepare_jax_anywhere,
    prepare_jax_on_cpu,
)
from jspeed.cli.interrupts import note_termination
from jspeed.cli.launch_options import launch
from jspeed.config import Config, load_config

app = typer.Typer(
    name="jspeed",
    help="Train Flax models larger than one device from one JSON file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(convert_app, name="convert")

app.command(context_settings={"allow_interspersed_args": False})(launch)
RunFile = Annotated[str, typer.Argument(metavar="RUN", help="A run file or ds_config.json.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as run.steps=10. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="TARGET", help="A name or a .json file, see jspeed targets."),
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Devices in all.")]
GpusPerHost = Annotated[int | None, typer.Option("--gpus-per-host", min=1)]


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


def _prepared(run: str, overrides: list[str], devices: int | None) -> Config:
    """The configuration of a run that is to be trained, once JAX has been told what it needs."""
    loaded = load_config(run, overrides=tuple(overrides))
    if devices is not None:
        overrides = [*overrides, *device_overrides(loaded, devices)]
        loaded = load_config(run, overrides=tuple(overrides))
    if loaded.model and loaded.data and loaded.run:
        # Now rather than after JAX is imported and a tokenizer trained.
        loaded.resolve_auto().require_trainable()
    prepare_jax(loaded, devices)
    return loaded


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
        loaded = _prepared(run, overrides, devices)
        from jspeed.cli.train import train_command

        code = train_command(loaded, resume=resume, overwrite=overwrite, terminated=terminated)
    raise typer.Exit(code)


@app.command()
def config(run: RunFile, set_: Overrides = None, json: AsJson = False) -> None:
    """Print the resolved configuration and what becomes of each key."""
    from jspeed.cli.config import config_command

    config_command(run, set_ or [], as_json=json)


@app.command()
def elastic(
    run: RunFile,
    set_: Overrides = None,
    world_size: Annotated[
        int | None,
        typer.Option("-w", "--world-size", min=1, help="Devices; prints what each then takes."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Print the batch that elasticity chooses, and where it holds."""
    from jspeed.cli.elastic import elastic_command

    elastic_command(run, set_ or [], world_size=world_size, as_json=json)


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


@app.command()
def targets(
    target: Annotated[
        str | None,
        typer.Argument(metavar="TARGET", help="Its figures and sources; a name or a .json file."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine: the target cpu.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Where --measure writes.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Print the devices that jspeed can plan for and what they can do."""
    from jspeed.cli.targets import targets_command

    targets_command(target, as_json=json, measure=measure, output=output)


@app.command()
def plan(
    run: RunFile,
    gpu: Gpu = None,
    gpus: Gpus = None,
    gpus_per_host: GpusPerHost = None,
    memory_picture: Annotated[
        Path | None,
        typer.Option(
            "--memory-picture", metavar="FILE", help="Draw what a device holds over the step (PNG)."
        ),
    ] = None,
    set_: Overrides = None,
    json: AsJson = False,
) -> None:
    """Compile a run for GPUs that need not be there."""
    loaded = load_config(run, overrides=tuple(set_ or []))  # now rather than after JAX is imported
    asked = cluster_asked(loaded, gpu=gpu, gpus=gpus, gpus_per_host=gpus_per_host)
    prepare_jax_on_cpu()
    from jspeed.cli.plan import PlanRequest, plan_command

    plan_command(PlanRequest(run, set_ or [], *asked, as_json=json, memory_picture=memory_picture))


@app.command()
def sweep(
    run: RunFile,
    gpu: Gpu = None,
    gpus: Gpus = None,
    gpus_per_host: GpusPerHost = None,
    axes: Annotated[
        str | None,
        typer.Option("--axes", help="Mesh axes that vary, as data,tensor; same as sweep.axes."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option("--top", min=1, help="Do not compile what cannot enter so many best."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Compiles at a time; else by cores and memory."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the best on the devices of this machine.")
    ] = False,
    measure_top: Annotated[
        str, typer.Option("--measure-top", help="How many to run: a number, or all.")
    ] = "3",
    measure_steps: Annotated[
        int | None, typer.Option("--measure-steps", min=2, help="Same as sweep.measure_last_step.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The folder of results.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what an earlier sweep has compiled.")
    ] = False,
    set_: Overrides = None,
    json: AsJson = False,
) -> None:
    """Compile every layout of a run for a cluster, and rank them."""
    overrides = list(set_ or [])
    if axes is not None:
        overrides.append(f"sweep.axes={as_json([axis.strip() for axis in axes.split(',')])}")
    if measure_steps is not None:
        overrides.append(f"sweep.measure_last_step={measure_steps}")
    loaded = load_config(run, overrides=tuple(overrides))  # now rather than after JAX is imported
    asked = cluster_asked(loaded, gpu=gpu, gpus=gpus, gpus_per_host=gpus_per_host)
    platform_wanted = os.environ.get("JAX_PLATFORMS")
    prepare_jax_on_cpu()
    from jspeed.cli.sweep import SweepRequest, sweep_command

    request = SweepRequest(
        run=run,
        overrides=overrides,
        cluster=asked,
        top=top,
        jobs=jobs,
        output=output,
        fresh=fresh,
        measure=measure_top if measure else None,
        platform=platform_wanted,
        as_json=json,
    )
    raise typer.Exit(sweep_command(request))


@app.command()
def profile(
    run: RunFile,
    steps: Annotated[
        str, typer.Option("--steps", metavar="A:B", help="The first and last step to trace.")
    ] = "3:5",
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Where the trace goes; else run.dir/profile."),
    ] = None,
    depth: Annotated[
        int, typer.Option("--depth", min=-1, help="Modules down to this depth; -1: all.")
    ] = -1,
    set_: Overrides = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", min=1, help="Virtual CPU devices; mesh.data follows."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Trace steps of a run, and print where their time goes."""
    loaded = _prepared(run, list(set_ or []), devices)
    from jspeed.cli.profile import profile_command

    profile_command(loaded, steps=steps, output=output, depth=depth, as_json=json)


@app.command()
def schedule(
    stages: Annotated[int, typer.Option("--stages", min=1, help="Devices along mesh.pipe.")],
    microbatches: Annotated[
        int, typer.Option("--microbatches", min=1, help="Of a step, the gradient accumulation.")
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="gpipe, 1f1b, interleaved-1f1b, zb-h1; forward; all compares the four."
        ),
    ] = "all",
    chunks: Annotated[
        int | None,
        typer.Option("--chunks", min=1, help="Per stage; 2 for interleaved-1f1b, else 1."),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Backwards compute the forward again, as in remat.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.png", help="Draw a picture.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Draw a pipeline schedule, with its bubble, memory and messages."""
    from jspeed.cli.schedule import ScheduleRequest, schedule_command

    schedule_command(
        ScheduleRequest(
            kind=kind,
            stages=stages,
            microbatches=microbatches,
            chunks=chunks,
            recompute=recompute,
            output=output,
            as_json=json,
        )
    )


@app.command()
def report(json: AsJson = False) -> None:
    """Print what this machine has for a run, and what is missing."""
    from jspeed.cli.report import report_command

    raise typer.Exit(report_command(prepare_jax_anywhere, as_json=json))

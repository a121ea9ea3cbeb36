"""What `jspeed launch` understands on its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def launch(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="A script; a module with -m.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="The script's own.")
    ] = None,
    module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is a module, as in -m jspeed train RUN.")
    ] = False,
    no_python: Annotated[
        bool, typer.Option("--no_python", help="SCRIPT is a program of any kind.")
    ] = False,
    num_procs: Annotated[
        int | None,
        typer.Option(
            "--num_procs", help="Processes on each host, which share its GPUs, or its CPU."
        ),
    ] = None,
    num_gpus: Annotated[
        int | None,
        typer.Option("--num_gpus", "--num_accelerators", help="The first so many of each host."),
    ] = None,
    num_nodes: Annotated[
        int | None, typer.Option("--num_nodes", min=1, help="The first so many hosts.")
    ] = None,
    hostfile: Annotated[
        str | None,
        typer.Option("-H", "--hostfile", metavar="FILE", help='Lines "HOST slots=N".'),
    ] = None,
    include: Annotated[
        str, typer.Option("-i", "--include", metavar="HOST[:SLOT,...][@...]", help="Only these.")
    ] = "",
    exclude: Annotated[
        str, typer.Option("-e", "--exclude", metavar="HOST[:SLOT,...][@...]", help="Not these.")
    ] = "",
    master_addr: Annotated[
        str | None, typer.Option("--master_addr", help="Of the first host, for the others.")
    ] = None,
    master_port: Annotated[
        int | None, typer.Option("--master_port", min=1, max=65535, help="29500, or a free one.")
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option("--node_rank", help="Start this host's processes only, without ssh."),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option("--launcher", help="ssh, slurm or openmpi; an allocation of SLURM is found."),
    ] = None,
    launcher_args: Annotated[str, typer.Option("--launcher_args", help="For srun or mpirun.")] = "",
    ssh_port: Annotated[int | None, typer.Option("--ssh_port", help="Of the other hosts.")] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            "--log_dir", "--enable_each_rank_log", metavar="DIR", help="A file for each rank."
        ),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            "--max_restarts",
            min=0,
            help="How often to start anew after a crash; 0, or 100 elastic.",
        ),
    ] = None,
    elastic_training: Annotated[
        bool,
        typer.Option("--elastic_training", help="Go on without hosts that are gone."),
    ] = False,
    min_elastic_nodes: Annotated[
        int | None,
        typer.Option("--min_elastic_nodes", min=1, help="The same, with no fewer than so many."),
    ] = None,
    max_elastic_nodes: Annotated[
        int | None,
        typer.Option("--max_elastic_nodes", min=1, help="Use so many; the others stand by."),
    ] = None,
    bind_cores_to_rank: Annotated[
        bool,
        typer.Option("--bind_cores_to_rank", help="Share each host's cores out among processes."),
    ] = False,
    bind_core_list: Annotated[
        str | None,
        typer.Option("--bind_core_list", metavar="0-3,5", help="The same, with these only."),
    ] = None,
) -> None:
    """Start a script as several processes, on this host or others."""
    from jspeed.cli.launch import LaunchRequest, launch_command

    request = LaunchRequest(
        script=script,
        arguments=arguments or [],
        module=module,
        no_python=no_python,
        hostfile=hostfile,
        include=include,
        exclude=exclude,
        num_nodes=num_nodes,
        num_gpus=num_gpus,
        num_procs=num_procs,
        master_addr=master_addr,
        master_port=master_port,
        node_rank=node_rank,
        launcher=launcher,
        launcher_args=launcher_args,
        ssh_port=ssh_port,
        log_dir=log_dir,
        max_restarts=max_restarts,
        elastic_training=elastic_training,
        min_elastic_nodes=min_elastic_nodes,
        max_elastic_nodes=max_elastic_nodes,
        bind_cores_to_rank=bind_cores_to_rank,
        bind_core_list=bind_core_list,
    )
    raise typer.Exit(launch_command(request))

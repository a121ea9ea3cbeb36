"""`jspeed launch`: what the command line says becomes processes on hosts."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jspeed.core.errors import LaunchError
from jspeed.core.processes import LAUNCH, RESTARTS, find_wiring
from jspeed.launch import Launch, first, local_gpus, read_hostfile, run_launch, select
from jspeed.launch.cores import Binding, parse_core_list
from jspeed.launch.elastic import Elastic, device_counts
from jspeed.launch.hosts import LOCAL, Slots

LAUNCHERS = ("ssh", "slurm", "openmpi")
ELASTIC_RESTARTS = 100
"""DeepSpeed's, of elastic training."""
_PLACED = ("SLURM", "Open MPI", "torchrun")


@dataclass(frozen=True)
class LaunchRequest:
    """What the command line says; see `jspeed launch --help`."""

    script: str
    arguments: Sequence[str]
    module: bool = False
    no_python: bool = False
    hostfile: str | None = None
    include: str = ""
    exclude: str = ""
    num_nodes: int | None = None
    num_gpus: int | None = None
    num_procs: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    node_rank: int | None = None
    launcher: str | None = None
    launcher_args: str = ""
    ssh_port: int | None = None
    log_dir: Path | None = None
    max_restarts: int | None = None
    elastic_training: bool = False
    min_elastic_nodes: int | None = None
    max_elastic_nodes: int | None = None
    bind_cores_to_rank: bool = False
    bind_core_list: str | None = None


def launch_command(request: LaunchRequest) -> int:
    """Runs to the end and returns the exit code.

    Raises:
      LaunchError: what the command line says cannot be done.
    """
    wiring = find_wiring()
    command = _command(request)
    if wiring is not None and wiring.source in _PLACED:
        # Somebody has started this process as one of several: it becomes the script.
        os.execvp(command[0], list(command))
    return run_launch(make_launch(request, command, os.environ))


def make_launch(
    request: LaunchRequest, command: Sequence[str], environ: Mapping[str, str]
) -> Launch:
    """What to run where.

    Raises:
      LaunchError: options contradict each other, or name what is not there.
    """
    for name, value in (("num_gpus", request.num_gpus), ("num_procs", request.num_procs)):
        if value is not None and value < 1:
            raise LaunchError(f"--{name} {value}; expected at least 1.")
    through = _through(request, environ)
    hosts, with_devices = ({}, False) if through else _hosts(request, environ)
    if request.node_rank is not None and not 0 <= request.node_rank < len(hosts):
        raise LaunchError(
            f"--node_rank {request.node_rank}: there are {len(hosts)} hosts; expected 0 to "
            f"{len(hosts) - 1}."
        )
    port = () if request.ssh_port is None else ("-p", str(request.ssh_port))
    return Launch(
        command=command,
        hosts=hosts,
        with_devices=with_devices,
        per_host=request.num_procs,
        address=request.master_addr,
        port=request.master_port,
        log_dir=request.log_dir,
        ssh=("ssh", "-o", "BatchMode=yes", *port),
        only=request.node_rank,
        through=through,
        max_restarts=_max_restarts(request),
        elastic=_elastic(request, command, through is not None),
        binding=_binding(request, through is not None),
    )


def _binding(request: LaunchRequest, through: bool) -> Binding | None:
    if not request.bind_cores_to_rank and request.bind_core_list is None:
        return None
    if through:
        name = "--bind_cores_to_rank" if request.bind_cores_to_rank else "--bind_core_list"
        raise LaunchError(
            f"{name}: SLURM or MPI starts the processes; have it bind them, with --launcher_args "
            '"--cpu-bind=cores" (SLURM) or "--bind-to core" (Open MPI).'
        )
    given = request.bind_core_list
    return Binding(None if given is None else parse_core_list(given))


def _max_restarts(request: LaunchRequest) -> int:
    if request.max_restarts is not None:
        return request.max_restarts
    return ELASTIC_RESTARTS if request.elastic_training else 0


def _elastic(request: LaunchRequest, command: Sequence[str], through: bool) -> Elastic | None:
    """Within what a run may shrink, if it may."""
    asked = {
        "--elastic_training": request.elastic_training or None,
        "--min_elastic_nodes": request.min_elastic_nodes,
        "--max_elastic_nodes": request.max_elastic_nodes,
    }
    names = [name for name, value in asked.items() if value is not None]
    if not names:
        return None
    if through or request.node_rank is not None:
        who = "SLURM or MPI starts" if through else "--node_rank starts this host's"
        raise LaunchError(
            f"{names[0]}: {who} processes, and jspeed cannot leave hosts out. Use --hostfile and "
            'ssh (--launcher "ssh").'
        )
    return Elastic(
        request.min_elastic_nodes or 1, request.max_elastic_nodes, device_counts(command)
    )


def _command(request: LaunchRequest) -> list[str]:
    if request.no_python:
        return [request.script, *request.arguments]
    if request.module:
        return [sys.executable, "-m", request.script, *request.arguments]
    if not Path(request.script).is_file():
        raise LaunchError(
            f'"{request.script}": there is no such script. Give one, or a module with -m, as in '
            "jspeed launch -m jspeed train RUN."
        )
    return [sys.executable, request.script, *request.arguments]


def _hosts(request: LaunchRequest, environ: Mapping[str, str]) -> tuple[Slots, bool]:
    """The hosts and slots asked for, and whether slots are GPUs."""
    on_cpu = environ.get("JAX_PLATFORMS") == "cpu"
    if request.hostfile is not None:
        found, with_devices = read_hostfile(request.hostfile), not on_cpu
    else:
        gpus = 0 if on_cpu else local_gpus()
        if request.num_gpus is not None and not gpus:
            raise LaunchError(
                f"--num_gpus {request.num_gpus}: this host shows no GPU. For processes on the CPU "
                f"say --num_procs {request.num_gpus}."
            )
        found, with_devices = {LOCAL: tuple(range(gpus or 1))}, bool(gpus)
    chosen = select(found, include=request.include, exclude=request.exclude)
    return first(chosen, nodes=request.num_nodes, slots=request.num_gpus), with_devices


def _through(request: LaunchRequest, environ: Mapping[str, str]) -> list[str] | None:
    """The command of another launcher, if one is asked for or its allocation is found."""
    kind = request.launcher
    if kind is None:
        in_allocation = (
            "SLURM_JOB_ID" in environ
            and "SLURM_STEP_NODELIST" not in environ  # a step of one task starts its own
            and shutil.which("srun") is not None
        )
        here = request.hostfile or request.node_rank is not None or request.include
        kind = "slurm" if in_allocation and not here else "ssh"
    if kind not in LAUNCHERS:
        raise LaunchError(f'--launcher "{kind}"; expected one of {", ".join(LAUNCHERS)}.')
    more = shlex.split(request.launcher_args)
    if kind == "slurm":
        return _srun(request, more)
    if kind == "openmpi":
        return _mpirun(request, more)
    if more:
        raise LaunchError('--launcher_args goes with --launcher "slurm" or "openmpi".')
    return None


def _srun(request: LaunchRequest, more: Sequence[str]) -> list[str]:
    """SLURM knows the hosts; a task of it is a process."""
    nodes = [] if request.num_nodes is None else [f"--nodes={request.num_nodes}"]
    each = request.num_procs or request.num_gpus
    tasks = [] if each is None else [f"--ntasks-per-node={each}"]
    named = []
    if request.include or request.exclude:
        names = (request.include or request.exclude).split("@")
        if any(":" in name for name in names):
            raise LaunchError('--launcher "slurm" chooses GPUs by itself; name hosts without ":".')
        option = "nodelist" if request.include else "exclude"
        named = [f"--{option}={','.join(names)}"]
    # Its output is labelled, and one task's failure ends all.
    return ["srun", "--label", "--kill-on-bad-exit=1", *nodes, *tasks, *named, *more]


def _mpirun(request: LaunchRequest, more: Sequence[str]) -> list[str]:
    if request.hostfile is None:
        raise LaunchError('--launcher "openmpi" needs --hostfile FILE, lines "HOST slots=N".')
    hosts = select(
        read_hostfile(request.hostfile), include=request.include, exclude=request.exclude
    )
    hosts = first(hosts, nodes=request.num_nodes, slots=request.num_procs or request.num_gpus)
    where = ",".join(f"{host}:{len(slots)}" for host, slots in hosts.items())
    count = sum(map(len, hosts.values()))
    told = [option for name in (RESTARTS, LAUNCH) for option in ("-x", name)]
    return ["mpirun", "-np", str(count), "--host", where, "--tag-output", *told, *more]

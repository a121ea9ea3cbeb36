"""From a command and hosts to a run that ended: processes started, and again after a crash."""

from __future__ import annotations

import itertools
import os
import queue
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jspeed.core.errors import LaunchError
from jspeed.core.processes import LAUNCH, RESTARTS, Failure
from jspeed.launch.children import Child, Ended
from jspeed.launch.cores import Binding
from jspeed.launch.elastic import Elastic, Room, fit, without
from jspeed.launch.group import Outcome, Signals, run_group
from jspeed.launch.hosts import Slots
from jspeed.launch.node import NODE, Order, run_order
from jspeed.launch.output import Output
from jspeed.launch.plan import (
    DEFAULT_PORT,
    Member,
    coordinator_address,
    forwarded_environment,
    free_port,
    is_local,
    local_gpus,
    plan_members,
)

RESTART_SECONDS = 1.0
_UNREACHABLE = 255
"""What ssh ends with when it could not connect, or lost the connection."""
_PREFIX = re.compile(r"^(\[\d+\] )?(jspeed: )?")


@dataclass(frozen=True)
class Launch:
    """What to run, and where.

    Attributes:
      command: of every process.
      hosts: and their slots; not used with `through`.
      with_devices: whether slots are GPUs.
      per_host: processes on each host; None for one for each slot.
      address: of the first host, as the others reach it; None for its name.
      port: where process 0 answers; None for a free one on a single host, and 29500 on several.
      log_dir: where ranks have files of their own; None to show all.
      ssh: the command that reaches another host.
      only: the position of the one host whose processes to start here, the others being started on
        theirs; None to start all.
      through: another launcher's command, which starts all processes by itself; None to start them
        here.
      max_restarts: how often to start anew after a crash.
      binding: cores of each host to share out among its processes; None for no matter which.
      elastic: within what it may go on with fewer hosts; None for always all.
    """

    command: Sequence[str]
    hosts: Slots
    with_devices: bool
    per_host: int | None = None
    address: str | None = None
    port: int | None = None
    log_dir: Path | None = None
    ssh: Sequence[str] = ("ssh", "-o", "BatchMode=yes")
    only: int | None = None
    through: Sequence[str] | None = None
    max_restarts: int = 0
    elastic: Elastic | None = None
    binding: Binding | None = None


def run_launch(launch: Launch) -> int:
    """Runs to the end and returns the exit code: that of the process that failed first.

    After a crash all is started anew, so often as was asked for; not after a failure that would be
    the same again, nor once somebody asked to stop. What cannot be started then is said, and the
    exit code stays that of the crash.

    Raises:
      LaunchError: what cannot be started, before anything has been.
    """
    output = Output(launch.log_dir)
    try:
        with Signals() as signals:
            return _run_supervised(launch, signals, output)
    finally:
        output.close()


def _run_supervised(launch: Launch, signals: Signals, output: Output) -> int:
    identity = secrets.token_hex(8)
    outcome = before = None
    for restarts in itertools.count():
        try:
            if outcome is not None:
                launch = _without_lost_hosts(launch, outcome, output)
            fitting = _fitting(launch)
            if outcome is not None:
                output.say(f"starting again, {restarts} of {launch.max_restarts}")
                time.sleep(RESTART_SECONDS)
            if fitting.hosts != before and launch.elastic is not None:
                output.say(_in_words(fitting))
            before = fitting.hosts
            told = {RESTARTS: str(restarts), LAUNCH: identity}
            outcome = _run_once(fitting, told, signals, output)
        except LaunchError as error:
            if outcome is None:
                raise
            output.say(f"cannot start again: {error}")
            break
        if outcome.first is None or outcome.asked is not None:
            break
        _explain(outcome.first, output)
        if restarts == launch.max_restarts or _failure(outcome.first).permanent:
            break
    assert outcome is not None
    return outcome.code


def _run_once(launch: Launch, told: dict[str, str], signals: Signals, output: Output) -> Outcome:
    if launch.through is not None:
        whole, environment = [*launch.through, *launch.command], {**os.environ, **told}
        name = Path(launch.through[0]).name
        return run_group(
            lambda ended: [Child(name, whole, environment, show=None, ended=ended)], signals
        )
    hosts = list(launch.hosts)
    alone = len(hosts) == 1
    port = launch.port or (free_port() if alone and launch.only is None else DEFAULT_PORT)
    members = plan_members(
        launch.hosts,
        per_host=launch.per_host,
        address=coordinator_address(hosts, launch.address),
        port=port,
        with_devices=launch.with_devices,
    )
    members = [replace(member, environment={**member.environment, **told}) for member in members]
    if launch.only is not None:
        hosts = [hosts[launch.only]]
    if launch.only is not None or (alone and is_local(hosts[0])):
        own = [member.environment for member in members if member.host == hosts[0]]
        order = Order(launch.command, own, binding=launch.binding)
        silent = len(members) == 1 and launch.log_dir is None
        return run_order(order, signals, output, alone=silent)

    def start(ended: queue.Queue[Ended]) -> list[Child]:
        return [_start_host(launch, host, members, output, ended) for host in hosts]

    return run_group(start, signals)


def _start_host(
    launch: Launch, host: str, members: Sequence[Member], output: Output, ended: queue.Queue[Ended]
) -> Child:
    forwarded = forwarded_environment(os.environ, [Path.home(), Path.cwd()])
    order = Order(
        launch.command,
        [forwarded | dict(member.environment) for member in members if member.host == host],
        None if launch.log_dir is None else str(launch.log_dir.resolve()),
        str(Path.cwd()),
        launch.binding,
    )
    command = [sys.executable, "-m", NODE]
    if not is_local(host):
        path = {name: forwarded[name] for name in ("PYTHONPATH",) if name in forwarded}
        given = [f"{name}={value}" for name, value in path.items()]
        command = [*launch.ssh, host, shlex.join(["env", *given, *command] if given else command)]
    return Child(
        f"host {host}",
        command,
        dict(os.environ),
        show=output.pass_on,
        ended=ended,
        said=order.to_json() + "\n",
    )


def _failure(end: Ended) -> Failure:
    assert end.failure is not None
    return end.failure


def _explain(end: Ended, output: Output) -> None:
    """Says which process failed first and why, its own last lines included, after all else."""
    failure = _failure(end)
    where = f"{failure.name} on {end.child.name}" if failure.name else end.child.name
    is_host = end.child.name.startswith("host ")
    if is_host and end.code == _UNREACHABLE and not failure.name:
        where = f"{end.child.name}, which ssh does not reach or has lost"
    lines = [f"{where} failed first (exit code {end.code}): {failure.text}"]
    if not _says_no_more(end.child.lines, failure.text):
        lines += ["its last lines:", *(f"  {line}" for line in end.child.lines)]
    output.say("\n".join(lines))


def _says_no_more(lines: Iterable[str], reason: str) -> bool:
    """Whether lines of a process, or of the ranks of a host, are no more than its reason."""
    return {_PREFIX.sub("", line) for line in lines} <= set(reason.splitlines())


def _fitting(launch: Launch) -> Launch:
    """The launch on the part of its hosts that it can use now."""
    if launch.elastic is None:
        return launch
    room = fit(Room(launch.hosts, launch.per_host, launch.with_devices), launch.elastic)
    return replace(launch, hosts=room.hosts, per_host=room.per_host)


def _in_words(launch: Launch) -> str:
    counts = {
        host: len(slots) if launch.per_host is None else launch.per_host
        for host, slots in launch.hosts.items()
    }
    total = sum(counts.values())
    gpus = {
        host: f" ({len(launch.hosts[host])} GPUs)"
        if launch.with_devices and len(launch.hosts[host]) != count
        else ""
        for host, count in counts.items()
    }
    each = ", ".join(f"{count} on {host}{gpus[host]}" for host, count in counts.items())
    return f"{total} process{'' if total == 1 else 'es'}: {each}"


def _without_lost_hosts(launch: Launch, outcome: Outcome, output: Output) -> Launch:
    """The launch on the hosts that are left, if fewer will do.

    Raises:
      LaunchError: too few are left.
    """
    if launch.elastic is None:
        return launch
    lost = {
        end.child.name.removeprefix("host ")
        for end in outcome.ends
        if end.code == _UNREACHABLE and end.child.reported is None
    }
    hosts = without(launch.hosts, lost, launch.elastic)
    if lost:
        output.say(f"going on without {', '.join(sorted(lost))}")
    hosts = _with_gpus_that_are_left(hosts, output) if launch.with_devices else hosts
    address = None if launch.address in lost else launch.address
    return replace(launch, hosts=hosts, address=address)


def _with_gpus_that_are_left(hosts: Slots, output: Output) -> Slots:
    """A single host's slots, less those that its driver no longer has a GPU for.

    Raises:
      LaunchError: none is left.
    """
    if len(hosts) > 1 or not is_local(next(iter(hosts))):
        return hosts
    ((host, slots),) = hosts.items()
    shown = local_gpus()
    # The driver numbers those that are left anew, from 0; 0 of them is what it says without one.
    left = tuple(slot for slot in slots if slot < shown) if shown else slots
    if not left:
        raise LaunchError(
            f"{host} shows {shown} GPU{'' if shown == 1 else 's'}, numbered from 0; of this run's, "
            f"{', '.join(map(str, slots))}, none is left. Start it anew with --include."
        )
    if left != slots:
        output.say(
            f"going on with {len(left)} of {len(slots)} GPUs, {', '.join(map(str, left))}: "
            f"{host} shows {shown}"
        )
    return {host: left}

"""Which processes a run has, where, and what each is told."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jspeed.core.errors import LaunchError
from jspeed.core.processes import COORDINATOR, LOCAL_DEVICES, PROCESS, PROCESSES
from jspeed.launch.hosts import LOCAL, Slots

DEFAULT_PORT = 29500
VISIBLE_DEVICES = "JAX_CUDA_VISIBLE_DEVICES"
_NOT_FORWARDED = ("CUDA_VISIBLE_DEVICES", "XDG_RUNTIME_DIR")
"""What is another host's own."""
_FORWARDED = (
    *("CUDA_", "FI_", "GLOO_", "HF_", "JAX_", "JSPEED_", "LD_LIBRARY_PATH", "NCCL_", "NVIDIA_"),
    *("PYTHON", "TF_CPP_", "UCX_", "WANDB_", "XDG_", "XLA_"),
)
ENVIRONMENT_FILES = (".jspeed_env", ".deepspeed_env")


@dataclass(frozen=True)
class Member:
    """A process of a run.

    Attributes:
      rank: its number in the run.
      host: where it runs.
      environment: what it is told beside what its launcher has.
    """

    rank: int
    host: str
    environment: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def plan_members(
    hosts: Slots, *, per_host: int | None, address: str, port: int, with_devices: bool
) -> list[Member]:
    """The processes of a run, those of a host one after another.

    Each gets JAX's variables, and those that scripts written for torchrun and DeepSpeed read.

    Args:
      hosts: and their slots.
      per_host: processes on each host, which share its slots out; None for one for each slot.
      address: of the host of process 0, as the others reach it.
      port: free there.
      with_devices: whether slots are GPUs; otherwise they are only counted.

    Raises:
      LaunchError: processes cannot share a host's slots evenly.
    """
    shares: list[tuple[str, tuple[int, ...], int, int]] = []
    for host, slots in hosts.items():
        count = len(slots) if per_host is None else per_host
        if with_devices and len(slots) % count:
            raise LaunchError(
                f"--num_procs {count}: {host} has {len(slots)} GPUs, which so many processes "
                "cannot share evenly."
            )
        each = len(slots) // count if with_devices else 0
        shares += [
            (host, slots[local * each : (local + 1) * each], local, count) for local in range(count)
        ]
    members = []
    for rank, (host, devices, local, count) in enumerate(shares):
        environment = {
            COORDINATOR: f"{address}:{port}",
            PROCESSES: str(len(shares)),
            PROCESS: str(rank),
            "RANK": str(rank),
            "WORLD_SIZE": str(len(shares)),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "PYTHONUNBUFFERED": "1",
        }
        if devices:
            environment[LOCAL_DEVICES] = ",".join(map(str, devices))
        if devices and len(shares) == 1:  # a process alone does not read it
            environment[VISIBLE_DEVICES] = environment[LOCAL_DEVICES]
        members.append(Member(rank, host, environment))
    return members


def coordinator_address(hosts: Sequence[str], given: str | None) -> str:
    """How processes reach the first host.

    Raises:
      LaunchError: the others would take the name of the first for themselves.
    """
    if given:
        return given
    if len(hosts) > 1 and is_local(hosts[0]) and hosts[0] in (LOCAL, "127.0.0.1", "::1"):
        raise LaunchError(
            f"the first host is called {hosts[0]!r}, where the others would look for it on "
            "themselves. Say --master_addr ADDRESS, or name it in the hostfile as they do."
        )
    return hosts[0] if len(hosts) > 1 else LOCAL


def is_local(host: str) -> bool:
    """Whether a host is this one, by its name."""
    name = socket.gethostname()
    return host in (LOCAL, "127.0.0.1", "::1", name, name.partition(".")[0])


def free_port() -> int:
    """A port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def forwarded_environment(
    environ: Mapping[str, str], folders: Sequence[Path] = ()
) -> dict[str, str]:
    """The variables that processes on other hosts get.

    Args:
      environ: of the launcher; what concerns JAX, XLA, NCCL, CUDA, Python and the like goes along.
      folders: where `.jspeed_env` or `.deepspeed_env` may lie, lines of `NAME=VALUE`; those of
        later folders win.

    Raises:
      LaunchError: a line of such a file is malformed.
    """
    found = {
        name: value
        for name, value in environ.items()
        if name.startswith(_FORWARDED) and name not in _NOT_FORWARDED
    }
    for path in (folder / name for folder in folders for name in reversed(ENVIRONMENT_FILES)):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            name, equals, value = line.strip().removeprefix("export ").partition("=")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not equals or not name.isidentifier():
                raise LaunchError(f'"{path}", line {number}: expected NAME=VALUE.')
            found[name] = value
    return found


def local_gpus() -> int:
    """GPUs that this host's driver shows, without touching them; 0 without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len([*Path("/proc/driver/nvidia/gpus").glob("*")]) or len(
        [*Path("/dev").glob("nvidia[0-9]*")]
    )

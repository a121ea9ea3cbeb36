"""What a process of a run of several knows about itself, from its environment.

Nothing here imports JAX: a launcher, and a process that fails before JAX starts, need it too.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jspeed.core.errors import (
    AnomalyError,
    ConfigError,
    LaunchError,
    LayoutError,
    MissingExtraError,
    ModelError,
    OutOfMemoryError,
)

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
LOCAL_DEVICES = "JAX_LOCAL_DEVICE_IDS"
PROCESSES = "JSPEED_NUM_PROCESSES"
PROCESS = "JSPEED_PROCESS_ID"
RESTARTS = "JSPEED_RESTARTS"
"""How often a supervisor has started the run anew."""
LAUNCH = "JSPEED_LAUNCH_ID"
"""The name of a launch, the same after a restart."""
LAUNCHER = "JSPEED_LAUNCHER_PID"
"""The process that started this one; what that one's own children inherit is not for them."""
FAILURE_FILE = "JSPEED_FAILURE_FILE"
"""Where a process that fails says why."""

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PERMANENT = (
    *(AnomalyError, ConfigError, LayoutError, MissingExtraError, ModelError),
    OutOfMemoryError,  # a restart has the same devices or fewer, never room for more
)
# What the others of a run say when one of them is gone.
_LOST_PEER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket closed|coordination|heartbeat|"
    r"UNAVAILABLE|DEADLINE_EXCEEDED|distributed service",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Wiring:
    """A process's place among those of its run.

    Attributes:
      source: what said so: "jspeed launch", "torchrun", "SLURM" or "Open MPI".
      processes: of the run.
      process: the number of this one.
      coordinator: `host:port` where process 0 answers; None if JAX is to find it.
      local_device: the number of the one GPU that is this process's; None for all it sees, or for
        what `JAX_LOCAL_DEVICE_IDS` says.
    """

    source: str
    processes: int
    process: int
    coordinator: str | None = None
    local_device: int | None = None


def find_wiring(environ: Mapping[str, str] | None = None) -> Wiring | None:
    """What the environment says of the processes of this run; None for a run of one.

    Raises:
      LaunchError: it says it in part, or says what is no number.
    """
    environ = os.environ if environ is None else environ
    if PROCESSES in environ:
        wiring = Wiring(
            "jspeed launch",
            _number(environ, PROCESSES),
            _number(environ, PROCESS),
            _text(environ, COORDINATOR),
        )
    elif all(name in environ for name in _TORCHRUN):
        local = _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else None
        wiring = Wiring(
            "torchrun",
            _number(environ, "WORLD_SIZE"),
            _number(environ, "RANK"),
            f"{environ['MASTER_ADDR']}:{_number(environ, 'MASTER_PORT')}",
            local,
        )
    elif all(name in environ for name in _SLURM):
        wiring = Wiring("SLURM", _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_PROCID"))
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        wiring = Wiring(
            "Open MPI",
            _number(environ, "OMPI_COMM_WORLD_SIZE"),
            _number(environ, "OMPI_COMM_WORLD_RANK"),
            environ.get(COORDINATOR),
            _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        )
    else:
        return None
    if not 0 <= wiring.process < wiring.processes:
        raise LaunchError(
            f"{wiring.source} says that this is process {wiring.process} of {wiring.processes}; "
            "expected a number from 0 to one below that of the processes."
        )
    return wiring if wiring.processes > 1 else None


def restarts(environ: Mapping[str, str] | None = None) -> int:
    """How often a supervisor has started this run anew."""
    environ = os.environ if environ is None else environ
    return _number(environ, RESTARTS) if RESTARTS in environ else 0


@dataclass(frozen=True)
class Failure:
    """Why a process of several failed, in its own words.

    Attributes:
      text: for people.
      at: seconds since 1970.
      lost_peer: it failed because another one was gone.
      permanent: it would fail again if it were started again.
      name: of the process, where it is known.
    """

    text: str
    at: float
    lost_peer: bool
    permanent: bool = False
    name: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Failure:
        """From `to_json`."""
        return cls(**json.loads(text))

    def of(self, name: str) -> Failure:
        """This failure with the name of its process."""
        return replace(self, name=name)


def note_failure(error: BaseException, text: str) -> None:
    """Tells the launcher, if there is one, why this process fails; the first reason stays.

    Args:
      error: that ends it.
      text: what a person should read.
    """
    name = os.environ.get(FAILURE_FILE)
    if not name or os.environ.get(LAUNCHER) != str(os.getppid()) or Path(name).exists():
        return
    failure = Failure(
        text,
        time.time(),
        lost_peer=says_lost_peer(f"{type(error).__name__}: {error}"),
        permanent=isinstance(error, _PERMANENT),
    )
    partial = Path(f"{name}.{os.getpid()}")
    try:
        partial.write_text(failure.to_json())
        partial.rename(name)
    except OSError:
        return  # the process's own output and exit code still say it


def says_lost_peer(text: str) -> bool:
    """Whether an error's text reads like that of a process whose partner is gone."""
    return _LOST_PEER.search(text) is not None


def _text(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise LaunchError(
            f"{PROCESSES} is set, but {name} is not; jspeed launch sets both. Unset the first to "
            "run one process."
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not text.isdecimal():
        raise LaunchError(f"{name}={text!r} in the environment; expected a whole number.")
    return int(text)

"""Joining the other processes of a run; `jax.distributed` does the work."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
import traceback
from types import TracebackType
from typing import Any, NoReturn

import jax

from jspeed.core.errors import LaunchError
from jspeed.core.processes import Wiring, find_wiring, note_failure

TIMEOUT_SECONDS = 300


def init_distributed(*, timeout_seconds: int = TIMEOUT_SECONDS) -> bool:
    """Joins the run that this process is one of several of; does nothing in a run of one.

    `jspeed launch`, torchrun's variables (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), a
    SLURM step and Open MPI are recognised. Call it before anything asks JAX for devices.
    `jspeed.initialize` and `jspeed train` call it by themselves.

    From then on an exception that nobody catches, or `sys.exit` with a code, ends the process
    without waiting for the others, which would wait for it.

    Args:
      timeout_seconds: to wait for all processes.

    Returns:
      Whether there are several.

    Raises:
      LaunchError: JAX uses devices already, or not all processes came in time.
    """
    wiring = find_wiring()
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if wiring is None:
        return False
    sys.excepthook = _leave_at_once
    devices = None if wiring.local_device is None else [wiring.local_device]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's own handler of SIGTERM would take the place of those that save first.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            wiring.coordinator,
            wiring.processes if wiring.coordinator else None,
            wiring.process if wiring.coordinator else None,
            local_device_ids=devices,
            initialization_timeout=timeout_seconds,
        )
    except (RuntimeError, ValueError) as error:
        raise _not_joined(wiring, error, timeout_seconds) from error
    _leave_at_exit()
    return True


def _not_joined(wiring: Wiring, error: Exception, seconds: int) -> LaunchError:
    this = f"{wiring.source}: process {wiring.process} of {wiring.processes}"
    if "before any JAX" in str(error):
        return LaunchError(
            f"{this} uses JAX's devices before it has joined the others. Call "
            "jspeed.init_distributed() first of all, before jax.devices() and any array."
        )
    if wiring.process == 0 and re.search("start.*(service|server)|in use", str(error)):
        return LaunchError(
            f"{this} cannot listen at {wiring.coordinator}: another process probably does. Choose "
            "another port: jspeed launch --master_port PORT."
        )
    at = f" at {wiring.coordinator}" if wiring.coordinator else ""
    return LaunchError(
        f"{this} did not join the others{at} within {seconds} s: {str(error).splitlines()[0]} "
        "Check that every host can reach that address and port (jspeed launch --master_addr, "
        "--master_port) and that all processes were started."
    )


def _leave_at_once(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """For `sys.excepthook`: the interpreter's own end would wait for the other processes, which
    wait for this one."""
    traceback.print_exception(kind, error, where)
    leave(128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1, error)


def _leave_at_exit() -> None:
    """The same for `sys.exit(code)`, once everything that stands in its way has run."""
    codes: list[Any] = []
    leave_python = sys.exit

    def remember(code: Any = None, /) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            codes[:] = [code]
        leave_python(code)

    def follow() -> None:
        if codes and codes[0]:
            code = codes[0] if isinstance(codes[0], int) else 1
            leave(code, SystemExit(codes[0]))

    sys.exit = remember
    atexit.register(follow)  # before JAX's own, which waits for the others


def leave(code: int, error: BaseException | None = None) -> None:
    """Ends this process at once, having said why to whoever launched it."""
    if error is not None:
        note_failure(error, "".join(traceback.format_exception_only(error)).strip())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

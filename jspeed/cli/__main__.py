"""The entry point of the `jspeed` command."""

from __future__ import annotations

import functools
import os
import sys

from jspeed.cli.failures import INTERRUPTED, guarded
from jspeed.cli.interrupts import leave_on_interrupt


def main() -> None:
    """Runs the command line and leaves with its exit code, see `jspeed.cli.failures`."""
    leave_on_interrupt()
    # Only now, so that Ctrl-C while modules are being imported shows no traceback either.
    from jspeed.cli.app import app

    code = guarded(functools.partial(app, prog_name="jspeed"))
    if code == INTERRUPTED or (code and _has_joined_others()):
        # A compilation that was interrupted can leave XLA in a state in which it cannot be shut
        # down, and one of several processes would wait for the others at its end; all that
        # matters has been written.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _has_joined_others() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


if __name__ == "__main__":
    main()

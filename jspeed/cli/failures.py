"""Errors as one clear message; never a traceback, unless JSPEED_TRACEBACK asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from jspeed.core.errors import ConfigError, JspeedError
from jspeed.core.processes import note_failure

USER_ERROR, UNEXPECTED, INTERRUPTED = 2, 1, 130


def guarded(command: Callable[..., Any]) -> int:
    """Runs a command line and returns its exit code.

    0 is success, 2 what the user can mend (one message on standard error), 1 the rest, 130 Ctrl-C.
    """
    try:
        command()
        sys.stdout.flush()
    except SystemExit as done:
        return _code(done)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _nobody_reads()
    except JspeedError as error:
        _reraise_if_wanted()
        note_failure(error, message(error))
        print(f"jspeed: {message(error)}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        _reraise_if_wanted()
        note_failure(error, f"unexpected {type(error).__name__}: {error}")
        print(
            f"jspeed: unexpected {type(error).__name__}: {error}\n"
            "Set JSPEED_TRACEBACK=1 to see where, and please report it.",
            file=sys.stderr,
        )
        return UNEXPECTED
    return 0


def message(error: JspeedError) -> str:
    """An error's text; the problems of a configuration one below the other."""
    problems = str(error).split("\n")
    if isinstance(error, ConfigError) and len(problems) > 1:
        return "\n  ".join([f"{len(problems)} problems in the configuration:", *problems])
    return str(error)


def _code(done: SystemExit) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _nobody_reads()
    return done.code if isinstance(done.code, int) else int(done.code is not None)


def _nobody_reads() -> int:
    # Otherwise Python tries once more at exit, and complains.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNEXPECTED


def _reraise_if_wanted() -> None:
    if os.environ.get("JSPEED_TRACEBACK"):
        raise

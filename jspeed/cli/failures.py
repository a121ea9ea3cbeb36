"""Errors as one clear message; never a traceback, unless JSPEED_TRACEBACK asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from jspeed.core.errors import JspeedError


def guarded(command: Callable[..., Any]) -> int:
    """Runs a command line; returns its exit code: 2 for what the user can mend, 1 for the rest."""
    try:
        command()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if os.environ.get("JSPEED_TRACEBACK"):
            raise
        if isinstance(error, JspeedError):
            print(f"jspeed: {error}", file=sys.stderr)
            return 2
        print(
            f"jspeed: unexpected {type(error).__name__}: {error}\n"
            "Set JSPEED_TRACEBACK=1 to see where, and please report it.",
            file=sys.stderr,
        )
        return 1
    return 0

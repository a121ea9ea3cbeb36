"""A worker whose jobs go wrong in every way that compiling can: for the tests of the pool."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jspeed.core.errors import ConfigError
from jspeed.planner.worker import Handler, serve

_HELD: list[bytes] = []


def handle(job: Mapping[str, Any]) -> Any:
    kind = job["kind"]
    if kind == "abort":
        os.write(2, b"written to STDERR by a plugin\n")
        os.write(2, b"F0000 00:00:01 spmd.cc:7] Check failed: rank == 2 (3 vs. 2)\n    @ 0x55aa\n")
        os.abort()
    elif kind == "exit":
        os._exit(3)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "refuse":
        raise ConfigError('"mesh.data": 3 does not fit.')
    elif kind == "raise":
        raise ValueError("first line\nsecond line")
    elif kind == "sleep":
        Path(job["file"]).write_text(str(os.getpid()))
        time.sleep(job["seconds"])
    elif kind == "hold":
        _HELD.append(b"x" * job["bytes"])
        time.sleep(job["seconds"])
    elif kind == "print":
        print("not an answer")
    return {"pid": os.getpid(), "seen": os.environ.get("ODD"), "kind": kind}


def prepare() -> Handler:
    if os.environ.get("ODD") == "never":
        raise SystemExit("no such plugin")
    return handle


if __name__ == "__main__":
    serve(prepare)

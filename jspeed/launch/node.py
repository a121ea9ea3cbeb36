"""Runs the processes of one host, as another host's launcher says on standard input.

The first line is the order, as JSON. Later lines name signals to pass on. When the input closes,
as it does when the connection or the launcher is lost, all processes are ended.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jspeed.core.errors import LaunchError
from jspeed.core.processes import PROCESS, Failure
from jspeed.launch.children import REPORT, Child, Ended, write_line
from jspeed.launch.cores import THREADS, Binding, shares, usable_cores
from jspeed.launch.group import Outcome, Signals, run_group
from jspeed.launch.output import Output

NODE = "jspeed.launch"
"""The module that another host runs."""
LOST_SECONDS = 5.0
"""From the loss of the launcher to the end of what does not stop by itself."""


@dataclass(frozen=True)
class Order:
    """What a host is to run.

    Attributes:
      command: of every process.
      environments: of each process, beside that of the host.
      log_dir: where ranks have files of their own; None to show all.
      folder: the working directory; None for the present one.
      binding: cores to share out among the processes; None to leave them to the system.
    """

    command: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    log_dir: str | None = None
    folder: str | None = None
    binding: Binding | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(
            {
                "command": list(self.command),
                "environments": [dict(environment) for environment in self.environments],
                "log_dir": self.log_dir,
                "folder": self.folder,
                "binding": None if self.binding is None else asdict(self.binding),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Order:
        found = json.loads(text)
        given = found["binding"]
        cores = None if given is None or given["cores"] is None else tuple(given["cores"])
        binding = None if given is None else Binding(cores)
        return cls(
            found["command"], found["environments"], found["log_dir"], found["folder"], binding
        )


def run_order(order: Order, signals: Signals, output: Output, *, alone: bool = False) -> Outcome:
    """Runs the processes of one host to their end.

    Args:
      order: what to run.
      signals: entered.
      output: where their lines go.
      alone: the one process there is keeps this one's input and output.
    """

    count = len(order.environments)
    cores: list[tuple[int, ...] | None] = [None] * count
    if order.binding is not None:
        cores = [*shares(order.binding, count, usable=usable_cores())]

    def start(ended: queue.Queue[Ended]) -> list[Child]:
        children: list[Child] = []
        try:
            for environment, own in zip(order.environments, cores, strict=True):
                rank = int(environment[PROCESS])
                children.append(
                    Child(
                        f"rank {rank}",
                        order.command,
                        {**_threads(own), **os.environ, **environment},
                        show=None if alone else write_line(output, rank),
                        ended=ended,
                        folder=order.folder,
                        cores=own,
                    )
                )
        except LaunchError:
            for child in children:
                child.send(signal.SIGKILL)
            raise
        return children

    return run_group(start, signals)


def _threads(cores: Sequence[int] | None) -> dict[str, str]:
    """What libraries that count cores for themselves are told."""
    return {} if cores is None else {THREADS: str(len(cores))}


def main() -> None:
    """Obeys an order from standard input; the exit code is that of the process that failed."""
    order = Order.from_json(sys.stdin.readline())
    output = Output(None if order.log_dir is None else Path(order.log_dir))
    with Signals() as signals:
        threading.Thread(target=_heed, args=(signals,), daemon=True).start()
        try:
            outcome = run_order(order, signals, output)
            failure = None if outcome.first is None else _named(outcome.first)
            code = outcome.code
        except LaunchError as error:
            failure, code = Failure(str(error), time.time(), lost_peer=False, permanent=True), 2
    output.close()
    if failure is not None:
        print(f"{REPORT}{failure.to_json()}", flush=True)
    os._exit(code)  # the thread that reads the input cannot be ended


def _named(end: Ended) -> Failure:
    assert end.failure is not None
    return end.failure.of(end.child.name)


def _heed(signals: Signals) -> None:
    for line in sys.stdin:
        name = line.strip()
        if name in signal.Signals.__members__:
            signals.note(signal.Signals[name])
    signals.note(signal.SIGTERM)
    time.sleep(LOST_SECONDS)
    for _ in range(3):  # as three Ctrl-C: they are killed
        signals.note(signal.SIGINT)

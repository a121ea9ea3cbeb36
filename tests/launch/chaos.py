"""Kills processes of a supervised run at random moments, then takes half of its hosts away, and
compares its losses with those of a run that was left alone.

    python -m tests.launch.chaos --kills 20 --processes 4 --seed 1 --write docs/chaos.md

Moments are drawn over the wall time since the run was last started, so that compiling, saving and
restarting are hit as well as training. The run has two hosts, which are both this one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jspeed.launch.plan import free_port
from tests.cli.processes import command, environment
from tests.engine.runs import losses, tiny_run, write_run
from tests.launch.chaos_page import chaos_page

ROOT = Path(__file__).resolve().parents[2]
KEPT, LOST = HOSTS = ("alpha", "beta")
TOLERANCE = 1e-5
"""Relative, of losses after the loss of a host: sums over microbatches in another order."""
# All hosts are this one; of those that are gone the connection is lost, and cannot be made again.
_SSH = """#!/bin/sh
shift 2
host=$1
shift
test -e "{folder}/gone-$host" && exit 255
sh -c "$*"
code=$?
test -e "{folder}/gone-$host" && exit 255
exit $code
"""
_FAILED = re.compile(r"^jspeed launch: (.*) failed first \(exit code \d+\): (.*)$", re.MULTILINE)
_AGAIN = "jspeed launch: starting again"


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
      after: seconds since the processes were last started.
      whom: the process, as "rank 2", or the host whose processes were all killed.
      step: the last one whose metrics were written.
      doing: what the run was at.
      restart: the number of the restart that follows.
    """

    after: float
    whom: str
    step: int
    doing: str
    restart: int


@dataclass(frozen=True)
class Restart:
    """One restart, as the launcher tells it.

    Attributes:
      name: of the process that failed first.
      reason: why it failed.
      lines: all that the launcher said of it.
    """

    name: str
    reason: str
    lines: str


@dataclass
class Supervised:
    """A run of several processes on two hosts under `jspeed launch`, to be killed at.

    Attributes:
      folder: where all lies.
      name: of the run in it.
      processes: how many, half of them on each host.
      changes: of the run file, which saves often.
    """

    folder: Path
    name: str
    processes: int
    changes: dict[str, Any]
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.bin.mkdir(parents=True)
        ssh = self.bin / "ssh"
        ssh.write_text(_SSH.format(folder=self.bin))
        ssh.chmod(0o755)
        each = self.processes // len(HOSTS)
        (self.bin / "hosts").write_text("".join(f"{host} slots={each}\n" for host in HOSTS))
        write_run(self.run_file, tiny_run(self.directory, **self.changes))

    @property
    def directory(self) -> Path:
        return self.folder / self.name

    @property
    def bin(self) -> Path:
        return self.folder / f"{self.name}-bin"

    @property
    def run_file(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def finish(self, *, max_restarts: int = 0, kill: Any = None) -> int:
        """Runs to the end and returns the launcher's exit code.

        Args:
          max_restarts: of the supervisor.
          kill: called again and again with the running launcher; None to leave it alone.
        """
        arguments = ["launch", "--hostfile", str(self.bin / "hosts"), "--elastic_training"]
        arguments += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        arguments += ["--max_restarts", str(max_restarts)]
        arguments += ["-m", "jspeed", "train", str(self.run_file), "--resume"]
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        with self.log.open("a") as log:
            launcher = subprocess.Popen(
                command(*arguments),
                stdout=log,
                stderr=log,
                env=environment(JAX_PLATFORMS="cpu", PATH=path),
                cwd=ROOT,
            )
            while kill is not None and launcher.poll() is None and kill(launcher):
                time.sleep(0.02)
            return launcher.wait()

    def members(self, launcher: subprocess.Popen[Any]) -> dict[int, int]:
        """Rank -> process, of those that live."""
        found = {}
        for pid in _descendants(launcher.pid):
            try:
                told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [line for line in told if line.startswith(b"JSPEED_PROCESS_ID=")]
            if ranks:
                found.setdefault(int(ranks[0].partition(b"=")[2]), pid)
        return found

    def restarts(self) -> list[Restart]:
        """What the launcher said of each, in its order."""
        said = self.log.read_text()
        return [
            Restart(match[1], match[2], said[match.start() :].partition(_AGAIN)[0])
            for match in _FAILED.finditer(said)
        ]

    def resumed_from(self) -> int:
        """The step of the checkpoint from which it last went on; 0 if it began anew."""
        last = self.log.read_text().rpartition(_AGAIN)[2]
        found = re.search(r"resumed from \D*(\d+)", last)
        return 0 if found is None else int(found[1])

    def step(self) -> int:
        """The last step whose metrics are written."""
        try:
            lines = (self.directory / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"]
        except (OSError, IndexError, ValueError, KeyError):
            return 0

    def has_saved(self) -> bool:
        """Whether there is a whole checkpoint."""
        return (self.directory / "checkpoints" / "latest").exists()

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or was when its process was killed."""
        return any((self.directory / "checkpoints").glob("*.saving"))


class Killer:
    """Kills one process, then waits for the next start, and so on; at last takes a host away.

    Args:
      run: that is killed at.
      kills: how many times.
      rng: of moments and ranks.
      window: seconds after a start within which moments lie.
    """

    def __init__(self, run: Supervised, kills: int, rng: random.Random, window: float) -> None:
        self._run = run
        self._left = kills
        self._rng = rng
        self._window = window
        self._started: frozenset[int] = frozenset()
        self._since = self._due = 0.0
        self._first_step = 0

    def __call__(self, launcher: subprocess.Popen[Any]) -> bool:
        """Whether there is more to do."""
        members = self._run.members(launcher)
        now, pids = time.monotonic(), frozenset(members.values())
        if len(members) < self._run.processes:
            return True
        if not pids & self._started:
            self._started, self._since = pids, now
            self._due = now + self._rng.uniform(0, self._window)
            self._first_step = self._run.step()
        if self._left == 0:
            return not self._take_a_host_away(members, now)
        if now >= self._due > 0.0:
            self._kill(self._rng.choice(sorted(members)), members, now)
        return True

    def _kill(self, rank: int, members: dict[int, int], now: float) -> None:
        step, saving = self._run.step(), self._run.is_saving()
        doing = "starting" if step == self._first_step else "saving" if saving else "training"
        self._due = 0.0
        with suppress(ProcessLookupError):  # it failed by itself just now
            os.kill(members[rank], signal.SIGKILL)
            self._left -= 1
            self._note(now, f"rank {rank}", step, doing)

    def _take_a_host_away(self, members: dict[int, int], now: float) -> bool:
        """Once the run has gone on, and saved: all processes of one host at once, and the way to
        it."""
        step = self._run.step()
        if step <= self._first_step or not self._run.has_saved():
            return False
        (self._run.bin / f"gone-{LOST}").touch()
        pids = [members[rank] for rank in sorted(members)[len(members) // 2 :]]
        for pid in (_parent(pids[0]), *pids):  # what started them there first, so that it is silent
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._note(now, f"host {LOST}", step, "training")
        return True

    def _note(self, now: float, whom: str, step: int, doing: str) -> None:
        number = len(self._run.restarts()) + 1
        self._run.kills.append(Kill(round(now - self._since, 2), whom, step, doing, number))


def _parent(pid: int) -> int:
    found = re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def chaos(
    folder: Path, *, processes: int, kills: int, seed: int, steps: int, save_every: int
) -> tuple[Supervised, Supervised]:
    """A run that was left alone and one that was killed at; both have finished.

    Raises:
      AssertionError: one did not finish, or finished before all kills.
    """
    changes = {
        # At ten times this rate the training itself makes 1e-4 of a difference of 1e-7 within a
        # hundred steps, with whatever layouts are compared.
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "mesh": {"data": -1},
        "elasticity": {
            "enabled": True,
            "max_train_batch_size": 8,
            "micro_batch_sizes": [1, 2],
            "ignore_non_elastic_batch_info": True,
        },
        "run": {"steps": steps, "save_every": save_every, "keep_checkpoints": 2, "log_every": 100},
    }
    alone = Supervised(folder, "alone", processes, changes)
    killed = Supervised(folder, "killed", processes, changes)
    began = time.monotonic()
    first: list[float] = []

    def note_first_step(launcher: subprocess.Popen[Any]) -> bool:
        if alone.step() and not first:
            first.append(time.monotonic() - began)
        return not first

    assert alone.finish(kill=note_first_step) == 0, alone.log.read_text()
    rng, window = random.Random(seed), 2 * first[0]
    code = killed.finish(max_restarts=3 * kills + 3, kill=Killer(killed, kills, rng, window))
    assert code == 0, killed.log.read_text()
    assert len(killed.kills) == kills + 1, "the run ended before all kills: give it more steps"
    assert f"{processes // 2} processes: " in killed.log.read_text() or processes == 2
    return alone, killed


@dataclass(frozen=True)
class Comparison:
    """Losses of a run that was killed at, beside those of one that was left alone.

    Attributes:
      differing: the steps before the loss of the host that are not the same to the last bit.
      since: the step of the checkpoint from which half of the processes went on.
      furthest: the largest relative difference after it.
    """

    differing: tuple[int, ...]
    since: int
    furthest: float


def compare(alone: Supervised, killed: Supervised) -> Comparison:
    """What `killed` trained, beside what `alone` did; both have every step once."""
    expected, found = losses(alone.directory), losses(killed.directory)
    assert sorted(found) == sorted(expected)
    since = killed.resumed_from()
    before = (step for step in expected if step <= since)
    after = [step for step in expected if step > since]
    return Comparison(
        tuple(step for step in before if found[step] != expected[step]),
        since,
        max(abs(found[step] / expected[step] - 1) for step in after),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--save_every", type=int, default=10)
    parser.add_argument("--write", type=Path, help="a page of documentation")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = chaos(
            Path(folder),
            processes=options.processes,
            kills=options.kills,
            seed=options.seed,
            steps=options.steps,
            save_every=options.save_every,
        )
        compared = compare(alone, killed)
        page = chaos_page(options, killed, compared, time.monotonic() - began)
    print(page)
    if options.write:
        options.write.write_text(page)
    sys.exit(bool(compared.differing) or compared.furthest > TOLERANCE)


if __name__ == "__main__":
    main()

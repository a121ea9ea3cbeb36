"""Kills processes of a supervised run at random moments, and compares its losses with those of a
run that was left alone.

    python -m tests.launch.chaos --kills 20 --processes 4 --seed 1 --write docs/chaos.md

Moments are drawn over the wall time since the run was last started, so that compiling, saving and
restarting are hit as well as training.
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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.processes import command, environment
from tests.engine.runs import losses, tiny_run, write_run

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
      after: seconds since the processes were last started.
      rank: of the process.
      step: the last one whose metrics were written.
      doing: what the run was at.
    """

    after: float
    rank: int
    step: int
    doing: str


@dataclass
class Supervised:
    """A run of several processes under `jspeed launch`, to be killed at.

    Attributes:
      run_file: of the run; saves often.
      directory: of the run.
      processes: how many.
      log: what the launcher wrote.
    """

    run_file: Path
    directory: Path
    processes: int
    log: Path
    kills: list[Kill] = field(default_factory=list)

    def finish(self, *, max_restarts: int = 0, kill: Any = None) -> int:
        """Runs to the end and returns the launcher's exit code.

        Args:
          max_restarts: of the supervisor.
          kill: called again and again with the running launcher; None to leave it alone.
        """
        arguments = ["launch", "--num_procs", str(self.processes)]
        arguments += ["--max_restarts", str(max_restarts)]
        arguments += ["-m", "jspeed", "train", str(self.run_file), "--resume"]
        with self.log.open("a") as log:
            launcher = subprocess.Popen(
                command(*arguments),
                stdout=log,
                stderr=log,
                env=environment(JAX_PLATFORMS="cpu"),
                cwd=ROOT,
            )
            while kill is not None and launcher.poll() is None and kill(launcher):
                time.sleep(0.01)
            return launcher.wait()

    def members(self, launcher: subprocess.Popen[Any]) -> dict[int, int]:
        """Rank -> process, of those that live."""
        found = {}
        path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        for pid in path.read_text().split():
            try:
                told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [line for line in told if line.startswith(b"JSPEED_PROCESS_ID=")]
            if ranks:
                found[int(ranks[0].partition(b"=")[2])] = int(pid)
        return found

    def step(self) -> int:
        """The last step whose metrics are written."""
        try:
            lines = (self.directory / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"]
        except (OSError, IndexError, ValueError, KeyError):
            return 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or was when its process was killed."""
        return any((self.directory / "checkpoints").glob("*.saving"))


class Killer:
    """Kills one process, then waits for the next start, and so on.

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
        self._started: frozenset[int] | None = None
        self._since = self._due = 0.0
        self._first_step = 0

    def __call__(self, launcher: subprocess.Popen[Any]) -> bool:
        """Whether there is more to do."""
        members = self._run.members(launcher)
        now, pids = time.monotonic(), frozenset(members.values())
        if len(members) < self._run.processes:
            return self._left > 0
        if pids != self._started:
            self._started, self._since = pids, now
            self._due = now + self._rng.uniform(0, self._window)
            self._first_step = self._run.step()
        if now < self._due or self._due == 0.0:
            return self._left > 0
        rank = self._rng.choice(sorted(members))
        step, saving = self._run.step(), self._run.is_saving()
        os.kill(members[rank], signal.SIGKILL)
        doing = "starting" if step == self._first_step else "saving" if saving else "training"
        self._run.kills.append(Kill(round(now - self._since, 2), rank, step, doing))
        self._due = 0.0
        self._left -= 1
        return self._left > 0


def chaos(
    folder: Path, *, processes: int, kills: int, seed: int, steps: int, save_every: int
) -> tuple[Supervised, Supervised]:
    """A run that was left alone and one that was killed at; both have finished.

    Raises:
      AssertionError: one did not finish, or finished before all kills.
    """

    def supervised(name: str) -> Supervised:
        directory = folder / name
        shutil.rmtree(directory, ignore_errors=True)
        run = tiny_run(
            directory,
            mesh={"data": processes},
            run={"steps": steps, "save_every": save_every, "keep_checkpoints": 2, "log_every": 100},
        )
        return Supervised(
            write_run(folder / f"{name}.json", run), directory, processes, folder / f"{name}.log"
        )

    alone, killed = supervised("alone"), supervised("killed")
    began = time.monotonic()
    first: list[float] = []

    def note_first_step(launcher: subprocess.Popen[Any]) -> bool:
        if alone.step() and not first:
            first.append(time.monotonic() - began)
        return not first

    assert alone.finish(kill=note_first_step) == 0, alone.log.read_text()
    rng, window = random.Random(seed), 2 * first[0]
    code = killed.finish(max_restarts=3 * kills, kill=Killer(killed, kills, rng, window))
    assert code == 0, killed.log.read_text()
    assert len(killed.kills) == kills, "the run ended before all kills: give it more steps"
    return alone, killed


def differing(alone: Supervised, killed: Supervised) -> dict[int, tuple[float, float]]:
    """The steps whose losses are not the same to the last bit."""
    expected, found = losses(alone.directory), losses(killed.directory)
    assert sorted(found) == sorted(expected)
    return {step: (loss, found[step]) for step, loss in expected.items() if found[step] != loss}


def _page(options: argparse.Namespace, killed: Supervised, differ: int, seconds: float) -> str:
    rows = "\n".join(
        f"| {number} | {kill.after:.2f} s | {kill.rank} | {kill.doing} | {kill.step} |"
        for number, kill in enumerate(killed.kills, 1)
    )
    counts = ", ".join(
        f"{sum(kill.doing == doing for kill in killed.kills)} while {doing}"
        for doing in ("starting", "training", "saving")
    )
    said = killed.log.read_text()
    restarts = said.count("starting again")
    reasons = Counter(re.findall(r"failed first \(exit code \d+\): (.*)", said))
    why = "; ".join(f"{count} x {reason[:120]}" for reason, count in reasons.most_common())
    return f"""# Killed at random moments

```bash
python -m tests.launch.chaos --kills {options.kills} --processes {options.processes} \\
  --seed {options.seed} --steps {options.steps} --save_every {options.save_every} \\
  --write docs/chaos.md
```

A run of {options.processes} processes on the CPU (ZeRO-3, {options.steps} steps, a checkpoint every
{options.save_every}) under `jspeed launch --max_restarts`. After each start one process is killed
with SIGKILL: which one, and when, is drawn at random over wall time, so that importing, compiling,
training and saving are hit alike. {counts}; {seconds:.0f} s in all on {os.cpu_count()} cores.
{restarts} restarts; the launcher's reasons: {why}.

**{differ} of {options.steps} losses differ from those of the run that was left alone**, compared to
the last bit.

| kill | after the start | rank | the run was | last step written |
|---:|---:|---:|---|---:|
{rows}
"""


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
        differ = differing(alone, killed)
        page = _page(options, killed, len(differ), time.monotonic() - began)
    print(page)
    if options.write:
        options.write.write_text(page)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()

"""One process per folder, and what stays of it when the process ends in one way or another."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from jspeed.core.errors import OffloadError
from jspeed.offload import FileStore
from tests.offload.state_files import FILE, chunk, filled, go_over

CHILD = """
import os, sys, time
import numpy as np
from jspeed.offload import FileStore
store = FileStore(sys.argv[1], [3000] * 5, buffers=3)
for index in range(5):
    store.write(index, [np.full(3000, 7, np.float32)] * 3)
store.flush()
"""


@contextmanager
def child(directory: Path, rest: str) -> Iterator[subprocess.Popen[str]]:
    """A process with a store in `directory` that says a word when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD + rest, directory],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


WAITS = "print('ready', flush=True); sys.stdin.readline()"


def test_a_live_process_keeps_its_folder_and_a_killed_one_does_not(tmp_path: Path) -> None:
    with child(tmp_path, WAITS) as process:
        message = rf'"{tmp_path}/jspeed-optimizer-0" is in use by process {process.pid} on .+\. '
        with pytest.raises(OffloadError, match=message + "Stop that run, or give this one another"):
            filled(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        left = (tmp_path / FILE).stat()
        store = filled(tmp_path)
        assert (tmp_path / FILE).stat().st_size != left.st_size
        np.testing.assert_array_equal(store.read(3)[1], chunk(3)[1])
        store.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_when_a_process_ends(tmp_path: Path) -> None:
    with child(tmp_path, WAITS) as process:
        assert (tmp_path / FILE).exists()
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_that_ends_takes_nothing_away(tmp_path: Path) -> None:
    forks = """
child = os.fork()
if child == 0:
    sys.exit(5)  # runs what is to be done at exit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
for _, state in store.pass_over():
    state[0][:] += 1
assert store.read(2)[0][0] == 8
print("ready", flush=True)
sys.stdin.readline()
"""
    with child(tmp_path, forks):
        assert (tmp_path / FILE).exists()
        with pytest.raises(OffloadError, match="in use by process"):
            filled(tmp_path)


def test_processes_and_names_have_folders_of_their_own(tmp_path: Path) -> None:
    stores = [
        filled(tmp_path),
        filled(tmp_path, process=1),
        filled(tmp_path, process=1, name="parameters"),
    ]
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["jspeed-optimizer-0", "jspeed-optimizer-1", "jspeed-parameters-1"]
    with pytest.raises(OffloadError, match=re.escape(f"in use by process {os.getpid()} on ")):
        filled(tmp_path, process=1)
    for store in stores:
        go_over(store)
        store.close()


def test_a_store_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    filled(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_owner_removes_while_we_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, real = tmp_path / FILE.parent / "lock", fcntl.flock
    calls = []

    def flock(descriptor: int, operation: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    store = filled(tmp_path)
    assert len(calls) == 2
    with pytest.raises(OffloadError, match="in use by process"):
        filled(tmp_path)
    store.close()


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    (tmp_path / FILE.parent).mkdir()
    (tmp_path / FILE.parent / "notes").write_text("mine")
    store = FileStore(tmp_path, [], buffers=3)
    store.close()
    assert [path.name for path in (tmp_path / FILE.parent).iterdir()] == ["notes"]

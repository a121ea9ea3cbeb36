"""`jspeed launch` on small scripts: what they are told, what becomes of failures and signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jspeed.launch import children, group
from tests.cli.processes import Ran, command, environment, jspeed

TOLD = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "JSPEED_RESTARTS", "MINE")
print(json.dumps({name: os.environ.get(name) for name in names} | {"arguments": sys.argv[1:]}))
"""
FAILING = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
print(f"I am {rank}", flush=True)
if rank == 1:
    time.sleep(0.3)
    if sys.argv[1] == "raise":
        raise ValueError("the data of rank 1 are gone")
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(7)
time.sleep(60)
"""
WAITING = """
import os, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append("TERM"))
if "heed" in sys.argv:
    signal.signal(signal.SIGINT, lambda *_: stop.append("INT"))
print("ready", os.getpid(), flush=True)
while not stop:
    time.sleep(0.05)
print("stopped by", stop[0], flush=True)
sys.exit(130 if stop[0] == "INT" else 0)
"""


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def launch(*arguments: str, **variables: str) -> Ran:
    return jspeed("launch", *arguments, **{"JAX_PLATFORMS": "cpu", **variables})


def test_every_process_is_told_its_place(tmp_path):
    ran = launch("--num_procs", "3", script(tmp_path, TOLD), "--deepspeed", "ds.json", "-m")
    assert ran.code == 0, ran.all
    lines = sorted(ran.out.splitlines())
    for rank, line in enumerate(lines):
        prefix, _, told = line.partition(" ")
        assert prefix == f"[{rank}]"
        assert json.loads(told) == {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "JSPEED_RESTARTS": "0",
            "MINE": None,
            "arguments": ["--deepspeed", "ds.json", "-m"],
        }
    assert len(lines) == 3


def test_one_process_has_the_terminal_to_itself(tmp_path):
    ran = launch(script(tmp_path, TOLD))
    assert ran.code == 0
    assert json.loads(ran.out)["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("raise", 1, "rank 1 failed first (exit code 1): exit code 1"),
        ("kill", 137, "rank 1 failed first (exit code 137): ended by SIGKILL"),
        ("exit", 7, "rank 1 failed first (exit code 7)"),
    ],
)
def test_the_first_failure_ends_all_and_is_told_last(how, code, said, tmp_path):
    began = time.monotonic()
    ran = launch("--num_procs", "3", script(tmp_path, FAILING), how)
    assert ran.code == code
    assert time.monotonic() - began < 30  # the others would wait for a minute
    last = ran.err[ran.err.index("jspeed launch: ") :]
    assert last.startswith(f"jspeed launch: {said}")
    assert "  I am 1" in last
    if how == "raise":
        assert last.rstrip().endswith("ValueError: the data of rank 1 are gone")


def started(*arguments: str) -> subprocess.Popen[str]:
    """A launch of two processes that both wait to be stopped."""
    process = subprocess.Popen(
        command("launch", "--num_procs", "2", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(JAX_PLATFORMS="cpu"),
    )
    assert process.stdout is not None
    pids = [process.stdout.readline().split()[-1] for _ in range(2)]
    process.pids = [int(pid) for pid in pids]  # type: ignore[attr-defined]
    return process


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 0, "TERM"), (signal.SIGINT, 130, "INT")]
)
def test_signals_go_to_all_processes(number, code, said, tmp_path):
    process = started(script(tmp_path, WAITING), "heed")
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code, out
    assert sorted(out.splitlines()) == [f"[{rank}] stopped by {said}" for rank in range(2)]


def test_processes_end_when_their_launcher_is_killed(tmp_path):
    process = started(script(tmp_path, WAITING))
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in process.pids):  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.05)


FLAKY = """
import os, sys
print("start", os.environ["JSPEED_RESTARTS"], flush=True)
sys.exit(int(os.environ["JSPEED_RESTARTS"]) < 2 and os.environ["RANK"] == "1")
"""


def test_started_again_after_a_crash(tmp_path):
    ran = launch("--num_procs", "2", "--max_restarts", "3", script(tmp_path, FLAKY))
    assert ran.code == 0, ran.all
    assert ran.err.count("rank 1 failed first") == 2
    assert "starting again, 2 of 3" in ran.err
    assert ran.out.splitlines()[-1].endswith("start 2")


def test_started_again_only_so_often(tmp_path):
    ran = launch("--num_procs", "2", "--max_restarts", "1", script(tmp_path, FLAKY))
    assert ran.code == 1
    assert ran.err.count("rank 1 failed first") == 2
    assert ran.err.count("starting again") == 1


def test_what_would_fail_again_is_not_started_again():
    arguments = ("--num_procs", "2", "--max_restarts", "3", "-m", "jspeed", "train", "none.json")
    ran = launch(*arguments)
    assert ran.code == 2
    assert "starting again" not in ran.err
    last = ran.err[ran.err.index("jspeed launch: ") :]
    assert 'failed first (exit code 2): "none.json"' in last
    assert "its last lines" not in last  # they are the reason
    assert last.count('"none.json"') == 1


def test_a_file_for_each_rank(tmp_path):
    path = script(tmp_path, 'import os; print("I am", os.environ["RANK"])')
    ran = launch("--num_procs", "2", "--log_dir", str(tmp_path / "logs"), path)
    assert ran.code == 0
    assert ran.out == "I am 0\n"
    logs = {log.name: log.read_text() for log in (tmp_path / "logs").iterdir()}
    assert logs == {"rank_0.log": "I am 0\n", "rank_1.log": "I am 1\n"}


SSH = """#!/bin/sh
# Reaches hosts that are all this one; those that are gone have a file.
shift 2
host=$1
shift
test -e "{folder}/gone-$host" && exit 255
exec sh -c "$*"
"""


def with_hosts(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Options for three hosts, and the environment in which they are reached."""
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(SSH.format(folder=folder))
    ssh.chmod(0o755)
    (folder / "hosts").write_text("alpha slots=2\nbeta slots=1\ngamma slots=1\n")
    options = ["--hostfile", str(folder / "hosts"), "--master_addr", "127.0.0.1"]
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return options, {"PATH": path, "JSPEED_MINE": "along"}


def test_several_hosts(tmp_path):
    options, variables = with_hosts(tmp_path)
    path = script(tmp_path, TOLD.replace("MINE", "JSPEED_MINE"))
    ran = launch(*options, "--include", "alpha@gamma", path, **variables)
    assert ran.code == 0, ran.all
    told = {line[1]: json.loads(line[4:]) for line in ran.out.splitlines()}
    assert [told[rank]["LOCAL_RANK"] for rank in "012"] == ["0", "1", "0"]
    assert {one["WORLD_SIZE"] for one in told.values()} == {"3"}
    assert {one["JSPEED_MINE"] for one in told.values()} == {"along"}


def test_a_failure_on_another_host_ends_all(tmp_path):
    options, variables = with_hosts(tmp_path)
    ran = launch(*options, script(tmp_path, FAILING), "raise", **variables)
    assert ran.code == 1
    last = ran.err[ran.err.index("jspeed launch: ") :]
    assert last.startswith("jspeed launch: rank 1 on host alpha failed first (exit code 1)")
    assert "ValueError: the data of rank 1 are gone" in last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_other_hosts_hear_of_signals_and_of_the_loss_of_the_launcher(number, tmp_path):
    options, variables = with_hosts(tmp_path)
    process = subprocess.Popen(
        command("launch", *options, script(tmp_path, WAITING), "heed"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(JAX_PLATFORMS="cpu", **variables),
    )
    assert process.stdout is not None
    pids = [int(process.stdout.readline().split()[-1]) for _ in range(4)]
    process.send_signal(number)
    out, _ = process.communicate(timeout=40)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, out
        time.sleep(0.05)
    if number != signal.SIGKILL:
        assert process.returncode == (130 if number == signal.SIGINT else 0), out
        assert out.count("stopped by " + number.name.removeprefix("SIG")) == 4


def test_going_on_without_a_host_that_is_gone(tmp_path):
    """A host dies with its processes; the rest go on, with ranks and numbers of their own."""
    options, variables = with_hosts(tmp_path)
    text = """
import os, pathlib, signal, sys, time
if os.environ["JSPEED_RESTARTS"] == "0":
    if os.environ["RANK"] == "2":
        pathlib.Path(sys.argv[1]).touch()
        sys.exit(9)
    time.sleep(60)
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
"""
    gone = tmp_path / "gone-beta"
    options += ["--max_restarts", "3", "--min_elastic_nodes", "2"]
    ran = launch(*options, script(tmp_path, text), str(gone), **variables)
    assert ran.code == 0, ran.all
    assert "host beta, which ssh does not reach or has lost failed first" in ran.err
    assert "going on without beta" in ran.err
    lines = sorted(ran.out.splitlines()[-3:])
    assert lines == [f"[{rank}] rank {rank} of 3" for rank in range(3)]


def test_with_too_few_hosts_it_ends(tmp_path):
    options, variables = with_hosts(tmp_path)
    (tmp_path / "gone-beta").touch()
    options += ["--max_restarts", "3", "--min_elastic_nodes", "3"]
    ran = launch(*options, script(tmp_path, TOLD), **variables)
    assert ran.code == 255, ran.all
    reason = "--min_elastic_nodes 3: 2 of 3 hosts are left; lost: beta."
    assert f"jspeed launch: cannot start again: {reason}" in ran.err


SRUN = """#!/bin/sh
echo "srun got: $*"
"""


def test_in_an_allocation_srun_starts_the_processes(tmp_path):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    told = script(tmp_path, TOLD)
    ran = launch("--num_procs", "4", "--num_nodes", "2", told, "x", PATH=path, SLURM_JOB_ID="7")
    assert ran.code == 0, ran.all
    expected = "--label --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=4"
    assert ran.out.strip() == f"srun got: {expected} {sys.executable} {told} x"


def test_within_a_task_the_script_takes_its_place(tmp_path):
    """As under `srun jspeed launch script.py`: nothing more is started."""
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
    }
    ran = launch(script(tmp_path, "import os; print(os.getppid())"), **step)
    assert ran.code == 0, ran.all
    assert int(ran.out) == os.getpid()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.py"], '"none.py": there is no such script. Give one, or a module with -m'),
        (["--num_gpus", "2", __file__], "--num_gpus 2: this host shows no GPU"),
        (["--num_procs", "0", __file__], "--num_procs 0; expected at least 1"),
        (["--launcher", "pdsh", __file__], '--launcher "pdsh"; expected one of ssh, slurm'),
        (["--launcher", "openmpi", __file__], '"openmpi" needs --hostfile FILE'),
        (["--include", "other", __file__], "there is no host 'other'; there are: localhost"),
        (["--node_rank", "1", __file__], "--node_rank 1: there are 1 hosts; expected 0 to 0"),
    ],
)
def test_wrong_command_lines(arguments, expected):
    ran = launch(*arguments)
    assert ran.code == 2
    assert ran.err.startswith("jspeed: ")
    assert expected in ran.err
    assert "Traceback" not in ran.all


BLAMED = """
import os, sys, time
from jspeed.core.processes import note_failure
if os.environ["RANK"] == "1":
    note_failure(ConnectionRefusedError("connection refused"), "no data server")
    sys.exit(3)
time.sleep(60)
"""


def test_who_was_ended_is_not_blamed(tmp_path):
    """Though the one that failed says what a process says that lost its partner."""
    ran = launch("--num_procs", "2", script(tmp_path, BLAMED))
    assert ran.code == 3
    assert "rank 1 failed first (exit code 3): no data server" in ran.err


def test_what_a_failed_process_has_started_ends_with_it(tmp_path):
    text = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
sys.exit(1)
"""
    ran = launch("--num_procs", "2", script(tmp_path, text))
    assert ran.code == 1
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{line.split()[-1]}").exists() for line in ran.out.splitlines()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_output_that_cannot_be_shown_stops_nobody(tmp_path):
    """More than a pipe holds, of characters that the terminal does not have."""
    text = 'print(("\\N{FULL BLOCK}" * 1000 + "\\n") * 200); print("done")'
    ran = launch("--num_procs", "2", script(tmp_path, text), PYTHONIOENCODING="utf-8")
    assert ran.code == 0
    assert ran.out.count("done") == 2
    logs = ["--log_dir", str(tmp_path / "logs")]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_1.log").symlink_to("/dev/full")
    ran = launch("--num_procs", "2", *logs, script(tmp_path, text))
    assert ran.code == 0, ran.all


STUBBORN = """
import os, signal, sys, time
print("ready", os.getpid(), flush=True)
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
signal.pause()
"""


def test_asked_to_stop_those_that_do_not_are_ended(tmp_path, monkeypatch):
    """One has ended, and the other waits for it."""
    monkeypatch.setattr(group, "LINGER_SECONDS", 0.5)
    path, pids = script(tmp_path, STUBBORN), []

    def start(ended):
        def note(line: str) -> None:
            pids.append(int(line.split()[-1]))

        return [
            children.Child(
                f"rank {rank}",
                [sys.executable, path],
                {**os.environ, "RANK": str(rank)},
                show=note,
                ended=ended,
            )
            for rank in range(2)
        ]

    with group.Signals() as signals:

        def ask() -> None:
            while len(pids) < 2:
                time.sleep(0.02)
            signals.note(signal.SIGTERM)

        threading.Thread(target=ask).start()
        began = time.monotonic()
        outcome = group.run_group(start, signals, grace_seconds=0.5)
    assert time.monotonic() - began < 30
    assert outcome.first is None
    assert sorted(end.code for end in outcome.ends) == [137, 143]


def test_ctrl_c_in_a_terminal_reaches_a_process_alone_once(tmp_path):
    """Both it and the launcher are in the terminal's foreground."""
    text = """
import os, signal, time
count = []
signal.signal(signal.SIGINT, lambda *_: count.append(1))
print("ready", flush=True)
deadline = time.monotonic() + 20
while not count and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(1)
print("interrupts:", len(count), flush=True)
"""
    pid, terminal = pty.fork()
    if not pid:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.execv(sys.executable, command("launch", script(tmp_path, text)))
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    while b"interrupts:" not in said or not said.endswith(b"\n"):
        said += os.read(terminal, 1000)
    os.waitpid(pid, 0)
    assert b"interrupts: 1" in said

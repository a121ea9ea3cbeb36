"""Runs that go on with what is left: jspeed/launch/elastic.py, and `jspeed launch` around it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from jspeed.core.errors import LaunchError
from jspeed.launch import run as run_module
from jspeed.launch.elastic import Elastic, Room, device_counts, fit, without
from jspeed.launch.output import Output
from jspeed.launch.plan import plan_members
from jspeed.launch.run import Launch, run_launch
from tests.launch.test_launch import launch, script, with_hosts

SECTION = {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1, 2]}


def gpus(**hosts: int) -> Room:
    return Room({host: tuple(range(slots)) for host, slots in hosts.items()}, None, True)


def shape(room: Room) -> dict[str, int]:
    return {host: room.processes(host) for host in room.hosts}


@pytest.mark.parametrize(
    ("hosts", "counts", "expected"),
    [
        ({"a": 8, "b": 8, "c": 8}, (1, 2, 4, 8, 16, 32), {"a": 8, "b": 8}),
        ({"a": 8, "b": 8, "c": 8}, (3, 6, 12), {"a": 6, "b": 6}),
        ({"a": 2, "b": 1, "c": 1}, (1, 2, 4), {"a": 2, "b": 1, "c": 1}),
        ({"a": 1, "b": 2}, (1, 2, 4), {"b": 2}),
        ({"a": 3, "b": 3}, (1, 2, 4), {"a": 2, "b": 2}),
        ({"a": 4}, (3, 5), {"a": 3}),
        ({"a": 4, "b": 4}, None, {"a": 4, "b": 4}),
    ],
)
def test_the_most_devices_that_hold_on_the_fewest_hosts(hosts, counts, expected):
    assert shape(fit(gpus(**hosts), Elastic(1, None, counts))) == expected


def test_no_more_hosts_than_the_most_and_no_fewer_than_the_least():
    room = gpus(a=4, b=4, c=4)
    assert shape(fit(room, Elastic(1, 2))) == {"a": 4, "b": 4}
    assert shape(fit(room, Elastic(3, None, (4, 6)))) == {"a": 2, "b": 2, "c": 2}
    with pytest.raises(LaunchError) as error:
        fit(room, Elastic(3, None, (4, 8)))
    assert str(error.value) == (
        '"elasticity": 12 devices are left, on a, b, c; none of the numbers that share the batch '
        "evenly can be started there on at least 3 host(s): 4, 8."
    )
    with pytest.raises(LaunchError, match="--min_elastic_nodes 4: there are 3 hosts: a, b, c"):
        fit(room, Elastic(4))
    with pytest.raises(LaunchError, match="--max_elastic_nodes 1 is below --min_elastic_nodes 2"):
        Elastic(2, 1)


def test_processes_that_share_gpus_keep_their_number_of_them():
    room = Room({"a": tuple(range(8)), "b": tuple(range(8))}, 4, True)
    found = fit(room, Elastic(1, None, (4, 12)))
    assert (found.hosts, found.per_host) == ({"a": tuple(range(6)), "b": tuple(range(6))}, 3)
    unlike = Room({"a": tuple(range(8)), "b": tuple(range(4))}, 4, True)
    assert fit(unlike, Elastic(1, None, (8, 16))).hosts == {"a": tuple(range(8))}


@pytest.mark.parametrize(
    ("gpus", "processes", "counts", "expected"),
    [
        (8, 1, (1, 2, 4), (1, 4)),
        (7, 1, (1, 2, 4), (1, 4)),
        (8, 2, (1, 2, 6), (2, 6)),
        (7, 4, (2, 4, 6), (3, 6)),
        (7, 4, (7,), (1, 7)),
        (8, 4, (2, 4), (2, 4)),
        (3, 4, (1, 2, 3), (3, 3)),
    ],
)
def test_processes_with_several_gpus_give_some_up(gpus, processes, counts, expected):
    found = fit(Room({"a": tuple(range(gpus))}, processes, True), Elastic(1, None, counts))
    assert (found.per_host, len(found.hosts["a"])) == expected
    plan_members(found.hosts, per_host=found.per_host, address="a", port=1, with_devices=True)


def test_processes_on_the_cpu_have_its_virtual_devices(monkeypatch):
    room = Room({"a": (0,)}, 3, False)
    assert fit(room, Elastic(1, None, (1, 2, 4))).per_host == 2
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    assert fit(room, Elastic(1, None, (1, 2, 4))).per_host == 2
    assert fit(room, Elastic(1, None, (1, 2, 6))).per_host == 3


def test_hosts_that_are_lost():
    hosts = {"a": (0,), "b": (0,), "c": (0,)}
    assert without(hosts, {"b"}, Elastic(2)) == {"a": (0,), "c": (0,)}
    with pytest.raises(LaunchError, match="--min_elastic_nodes 2: 1 of 3 hosts are left; lost: a"):
        without(hosts, {"a", "b"}, Elastic(2))


def test_the_configuration_is_found_in_the_command(tmp_path):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"elasticity": SECTION}))
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"elasticity": SECTION, "mesh": {"replica": 2}}))
    train = ["python", "-m", "jspeed", "train"]
    limit = "elasticity.max_gpus=4"
    commands = {
        (1, 2, 4, 8): ["python", "train.py", "--lr", "1", "--deepspeed", str(file)],
        (2, 4, 8): [*train, str(run), "--resume"],
        (2, 4): [*train, "--set", limit, str(run)],
        None: ["python", "train.py", "--deepspeed", "--lr", "1"],
    }
    assert {device_counts(command): command for command in commands.values()} == commands
    assert device_counts(["python", "x.py", "--deepspeed", f"--deepspeed_config={file}"])
    assert device_counts(["python", "x.py", "--deepspeed", str(tmp_path / "none.json")]) is None
    file.write_text(json.dumps({"train_batch_size": 8}))
    assert device_counts(["python", "x.py", "--deepspeed", str(file)]) is None
    file.write_text('{"train_batch_size": 0}')
    assert device_counts(["python", "x.py", "--deepspeed", str(file)]) is None


LOSING_BETA = """
import os, pathlib, sys, time
if os.environ["JSPEED_RESTARTS"] == "0":
    if os.environ["RANK"] == "2":
        pathlib.Path(sys.argv[1]).touch()
        sys.exit(9)
    time.sleep(60)
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
"""


def test_what_is_left_is_the_most_that_shares_the_batch(tmp_path):
    """Four processes lose a host; three are left, of which the batch takes two."""
    options, variables = with_hosts(tmp_path)
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"elasticity": SECTION}))
    arguments = (script(tmp_path, LOSING_BETA), str(tmp_path / "gone-beta"))
    ran = launch(*options, "--elastic_training", *arguments, "--deepspeed", str(file), **variables)
    assert ran.code == 0, ran.all
    assert "starting again, 1 of 100" in ran.err
    said = [line for line in ran.err.splitlines() if "process" in line and ": " in line]
    assert [line for line in said if " on alpha" in line and "failed" not in line] == [
        "jspeed launch: 4 processes: 2 on alpha, 1 on beta, 1 on gamma",
        "jspeed launch: 2 processes: 2 on alpha",
    ]
    assert sorted(ran.out.splitlines()[-2:]) == ["[0] rank 0 of 2", "[1] rank 1 of 2"]


def test_a_host_that_stood_by_takes_the_place_of_one_that_is_lost(tmp_path):
    options, variables = with_hosts(tmp_path)
    (tmp_path / "gone-beta").touch()
    options += ["--max_elastic_nodes", "2", "--max_restarts", "1"]
    path = script(tmp_path, 'import os; print(os.environ["RANK"], "of", os.environ["WORLD_SIZE"])')
    ran = launch(*options, path, **variables)
    assert ran.code == 0, ran.all
    assert "3 processes: 2 on alpha, 1 on beta" in ran.err
    assert "3 processes: 2 on alpha, 1 on gamma" in ran.err


@pytest.mark.parametrize(
    ("slots", "shown", "left"),
    [
        ((0, 1, 2, 3), 4, (0, 1, 2, 3)),
        ((0, 1, 2, 3), 3, (0, 1, 2)),
        ((4, 5, 6, 7), 7, (4, 5, 6)),
        ((2, 3, 4, 5), 3, (2,)),
        ((0, 2), 7, (0, 2)),
        ((0, 1), 0, (0, 1)),
    ],
)
def test_gpus_that_the_driver_no_longer_shows_are_left_out(monkeypatch, capsys, slots, shown, left):
    monkeypatch.setattr(run_module, "local_gpus", lambda: shown)
    found = run_module._with_gpus_that_are_left({"localhost": slots}, Output())
    assert found == {"localhost": left}
    said = f"going on with {len(left)} of {len(slots)} GPUs, {', '.join(map(str, left))}: "
    expected = f"jspeed launch: {said}localhost shows {shown}\n" if left != slots else ""
    assert capsys.readouterr().err == expected


def test_no_gpu_of_the_run_is_left(monkeypatch):
    monkeypatch.setattr(run_module, "local_gpus", lambda: 1)
    with pytest.raises(LaunchError) as error:
        run_module._with_gpus_that_are_left({"localhost": (2, 3)}, Output())
    assert str(error.value) == (
        "localhost shows 1 GPU, numbered from 0; of this run's, 2, 3, none is left. Start it anew "
        "with --include."
    )


def test_what_cannot_start_again_keeps_the_exit_code_of_the_crash(tmp_path, monkeypatch, capsys):
    """Both GPUs of the run are gone; so is all that was open."""
    closed: list[bool] = []
    monkeypatch.setattr(run_module, "local_gpus", lambda: 1)
    monkeypatch.setattr(Output, "close", lambda output: closed.append(True))
    command = [sys.executable, "-c", "raise SystemExit(9)"]
    hosts = {"localhost": (2, 3)}
    run = Launch(command, hosts, True, log_dir=tmp_path, max_restarts=3, elastic=Elastic())
    assert run_launch(run) == 9
    assert "jspeed launch: cannot start again: localhost shows 1 GPU" in capsys.readouterr().err
    assert len(closed) == 1
    with pytest.raises(LaunchError, match="--min_elastic_nodes 2: there are 1 hosts: localhost"):
        run_launch(replace(run, elastic=Elastic(2)))
    assert len(closed) == 2


def test_the_launcher_says_how_many_gpus_the_processes_of_a_host_have():
    told = Launch(["x"], {"a": (0, 1, 2, 3), "b": (0,)}, True, per_host=1)
    assert run_module._in_words(told) == "2 processes: 1 on a (4 GPUs), 1 on b"


@pytest.mark.parametrize("option", ["--elastic_training", "--min_elastic_nodes"])
def test_other_launchers_leave_no_host_out(tmp_path, option):
    options, variables = with_hosts(tmp_path)
    value = [] if option == "--elastic_training" else ["1"]
    ran = launch(*options, option, *value, "--launcher", "openmpi", script(tmp_path, "0"),
                 **variables)  # fmt: skip
    assert ran.code == 2
    assert ran.err.startswith(f"jspeed: {option}: SLURM or MPI starts processes, and jspeed cannot")

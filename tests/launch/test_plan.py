"""What each process of a run is told, and what it makes of it."""

from __future__ import annotations

import os
import re

import pytest

from jspeed.core.errors import ConfigError, DataError, LaunchError, OutOfMemoryError
from jspeed.core.processes import (
    FAILURE_FILE,
    LAUNCHER,
    Failure,
    Wiring,
    find_wiring,
    note_failure,
    says_lost_peer,
)
from jspeed.launch.plan import coordinator_address, forwarded_environment, plan_members

HOSTS = {"a": (0, 1, 2, 3), "b": (4, 5)}


def test_one_process_for_each_gpu():
    members = plan_members(HOSTS, per_host=None, address="a", port=1234, with_devices=True)
    assert [member.host for member in members] == ["a"] * 4 + ["b"] * 2
    last = members[-1].environment
    assert last["JAX_LOCAL_DEVICE_IDS"] == "5"
    assert last["JAX_COORDINATOR_ADDRESS"] == "a:1234"
    torch = {name: last[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert torch == {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_wiring(last) == Wiring("jspeed launch", 6, 5, "a:1234")


def test_processes_that_share_a_hosts_gpus():
    members = plan_members(HOSTS, per_host=2, address="a", port=1, with_devices=True)
    devices = [member.environment["JAX_LOCAL_DEVICE_IDS"] for member in members]
    assert devices == ["0,1", "2,3", "4", "5"]
    with pytest.raises(LaunchError, match="--num_procs 4: b has 2 GPUs"):
        plan_members(HOSTS, per_host=4, address="a", port=1, with_devices=True)


def test_one_process_alone_sees_the_gpus_that_are_its_own():
    (member,) = plan_members({"a": (2, 3)}, per_host=1, address="a", port=1, with_devices=True)
    assert member.environment["JAX_CUDA_VISIBLE_DEVICES"] == "2,3"


def test_on_the_cpu_nobody_is_told_of_devices():
    members = plan_members(HOSTS, per_host=3, address="a", port=1, with_devices=False)
    assert len(members) == 6
    assert not any("JAX_LOCAL_DEVICE_IDS" in member.environment for member in members)


def test_the_first_host_needs_a_name_that_others_know():
    assert coordinator_address(["localhost"], None) == "localhost"
    assert coordinator_address(["a", "b"], None) == "a"
    assert coordinator_address(["localhost", "b"], "10.0.0.1") == "10.0.0.1"
    with pytest.raises(LaunchError, match="--master_addr ADDRESS"):
        coordinator_address(["localhost", "b"], None)


def test_what_goes_along_to_other_hosts(tmp_path):
    environ = {"NCCL_DEBUG": "INFO", "HOME": "/root", "XLA_FLAGS": "--a=b", "PYTHONPATH": "x"}
    environ["CUDA_VISIBLE_DEVICES"] = "3"  # those of this host
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nMINE=a=b\n")
    (tmp_path / ".jspeed_env").write_text("# ours\n\nNCCL_DEBUG=ERROR\n")
    found = forwarded_environment(environ, [tmp_path])
    expected = {"NCCL_DEBUG": "ERROR", "XLA_FLAGS": "--a=b", "PYTHONPATH": "x", "MINE": "a=b"}
    assert found == expected
    (tmp_path / ".jspeed_env").write_text("MINE\n")
    with pytest.raises(LaunchError, match=r'.jspeed_env", line 1: expected NAME=VALUE'):
        forwarded_environment(environ, [tmp_path])


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "3",
}
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (TORCHRUN | {"LOCAL_RANK": "1"}, Wiring("torchrun", 4, 3, "h:29500", 1)),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, None),
        (SLURM, Wiring("SLURM", 8, 7)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # a batch script, no step
        (OPENMPI, Wiring("Open MPI", 2, 1, None, 1)),
    ],
)
def test_who_started_this_process(environ, expected):
    assert find_wiring(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"JSPEED_NUM_PROCESSES": "2"}, "JSPEED_PROCESS_ID is not; jspeed launch sets both"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x' in the environment; expected a whole number"),
        (TORCHRUN | {"RANK": "4"}, "torchrun says that this is process 4 of 4"),
    ],
)
def test_a_broken_environment(environ, expected):
    with pytest.raises(LaunchError, match=re.escape(expected)):
        find_wiring(environ)


def test_the_first_reason_of_a_failure_stays(tmp_path, monkeypatch):
    monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "failure.json"))
    monkeypatch.setenv(LAUNCHER, "1")
    note_failure(ConfigError("of a child's child"), "of a child's child")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    note_failure(ConfigError("the first"), "the first")
    note_failure(DataError("the second"), "the second")
    found = Failure.from_json((tmp_path / "failure.json").read_text())
    assert (found.text, found.lost_peer, found.permanent) == ("the first", False, True)
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]


@pytest.mark.parametrize(
    ("error", "permanent"),
    [(OutOfMemoryError("1 GiB"), True), (DataError("gone"), False), (OSError("disk"), False)],
)
def test_what_fails_the_same_way_again_is_permanent(tmp_path, monkeypatch, error, permanent):
    monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "failure.json"))
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    note_failure(error, str(error))
    found = Failure.from_json((tmp_path / "failure.json").read_text())
    assert found.permanent == permanent


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:6872", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        ("Terminating process because the JAX distributed service detected fatal errors", True),
        ("ValueError: the data are gone", False),
        ("RESOURCE_EXHAUSTED: Out of memory", False),
    ],
)
def test_who_only_lost_another(text, lost):
    assert says_lost_peer(text) == lost

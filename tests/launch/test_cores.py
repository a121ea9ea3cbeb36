"""jspeed/launch/cores.py, and `jspeed launch --bind_cores_to_rank`."""

from __future__ import annotations

import json
import os

import pytest

from jspeed.core.errors import LaunchError
from jspeed.launch.cores import Binding, parse_core_list, shares
from jspeed.launch.node import Order
from tests.launch.test_launch import launch, script, with_hosts


def test_lists_are_numbers_and_ranges():
    assert parse_core_list("0-3,5") == (0, 1, 2, 3, 5)
    assert parse_core_list("7,1,1-2") == (1, 2, 7)
    for text in ("", "a", "1,", "3-", "1 2"):
        with pytest.raises(LaunchError, match="expected numbers and ranges, as 0-3,5"):
            parse_core_list(text)
    with pytest.raises(LaunchError, match="3-1; expected the smaller number first"):
        parse_core_list("3-1")


def test_cores_are_shared_out_evenly(tmp_path):
    def share(processes, cores=None):
        return shares(Binding(cores), processes, usable=range(8), topology=tmp_path)

    assert share(2) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert share(3) == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert share(2, (1, 2, 6)) == [(1,), (2, 6)]
    with pytest.raises(LaunchError, match="core 9 cannot be used on this host; those that can: 0"):
        share(2, (1, 9))
    with pytest.raises(LaunchError, match="3 processes cannot share 2 cores out"):
        share(3, (1, 2))


def test_threads_of_a_core_and_cores_of_a_socket_stay_together(tmp_path):
    """Two sockets of two cores of two threads, numbered as Linux does: threads come last."""
    for core in range(8):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{core % 2}\n")
        (folder / "core_id").write_text(f"{core % 4 // 2}\n")
    found = shares(Binding(), 4, usable=range(8), topology=tmp_path)
    assert found == [(0, 4), (2, 6), (1, 5), (3, 7)]


def test_orders_travel_with_it():
    for binding in (None, Binding(), Binding((0, 2))):
        order = Order(["x"], [{"A": "b"}], None, None, binding)
        assert Order.from_json(order.to_json()) == order


BOUND = """
import json, os
names = ("RANK", "OMP_NUM_THREADS")
found = {name: os.environ.get(name) for name in names}
print(json.dumps(found | {"cores": sorted(os.sched_getaffinity(0))}))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_each_process_runs_on_its_own_cores(tmp_path):
    two = sorted(os.sched_getaffinity(0))[:2]
    listed = ",".join(map(str, two))
    options, variables = with_hosts(tmp_path)
    for where in (["--num_procs", "2"], [*options, "--include", "alpha@gamma"]):
        ran = launch(*where, "--bind_core_list", listed, script(tmp_path, BOUND), **variables)
        assert ran.code == 0, ran.all
        told = [json.loads(line.partition("] ")[2]) for line in sorted(ran.out.splitlines())]
        assert [one["cores"] for one in told[:2]] == [[two[0]], [two[1]]]
        assert told[0]["OMP_NUM_THREADS"] == "1"
    assert told[2]["cores"] == two  # alone on gamma


def test_more_processes_than_cores(tmp_path):
    ran = launch("--num_procs", "2", "--bind_core_list", "0", script(tmp_path, BOUND))
    assert ran.code == 2
    assert ran.err.startswith("jspeed: --bind_core_list: 2 processes cannot share 1 core out.")

"""Hostfiles, `--include` and `--exclude`, as DeepSpeed reads them."""

from __future__ import annotations

import re

import pytest

from jspeed.core.errors import LaunchError
from jspeed.launch import first, parse_hostfile, read_hostfile, select

HOSTS = {"worker-0": (0, 1, 2, 3), "worker-1": (0, 1, 2, 3)}


def test_a_hostfile():
    text = "# ours\nworker-0 slots=2\n\n  worker-1   slots=16 # large\n"
    assert parse_hostfile(text) == {"worker-0": (0, 1), "worker-1": tuple(range(16))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("worker-0", "line 1: 'worker-0'; expected \"HOST slots=N\""),
        ("a slots=2\nb slots=two", "line 2: 'b slots=two'; expected"),
        ("a slots=0", "line 1: 'a slots=0'; expected \"HOST slots=N\", N of at least 1"),
        ("a slots=1\na slots=1", "line 2: host 'a' stands there twice"),
        ("# nothing\n", 'names no host; expected lines "HOST slots=N"'),
    ],
)
def test_a_wrong_hostfile(text, expected):
    with pytest.raises(LaunchError, match=re.escape(expected)):
        parse_hostfile(text)


def test_a_hostfile_that_is_not_there(tmp_path):
    with pytest.raises(LaunchError, match=r'--hostfile ".*none" cannot be read: No such file'):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("worker-0", "", {"worker-0": (0, 1, 2, 3)}),
        ("worker-1:0,2", "", {"worker-1": (0, 2)}),
        ("worker-1:3,1@worker-0", "", {"worker-0": (0, 1, 2, 3), "worker-1": (1, 3)}),
        ("worker-1:0-2", "", {"worker-1": (0, 1, 2)}),
        ("", "worker-0", {"worker-1": (0, 1, 2, 3)}),
        ("", "worker-1:0", {"worker-0": (0, 1, 2, 3), "worker-1": (1, 2, 3)}),
        ("", "worker-0:0,1,2,3@worker-1:1", {"worker-1": (0, 2, 3)}),
        ("", "", HOSTS),
    ],
)
def test_selections(include, exclude, expected):
    found = select(HOSTS, include=include, exclude=exclude)
    assert found == expected
    assert list(found) == [host for host in HOSTS if host in found]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("worker-0", "worker-1", "--include and --exclude were both given"),
        ("worker-2", "", "there is no host 'worker-2'; there are: worker-0, worker-1."),
        ("worker-0:4", "", "worker-0 has no slot 4; it has 0, 1, 2, 3."),
        ("worker-0:a", "", "'worker-0:a'; expected HOST or HOST:SLOT,SLOT"),
        ("worker-0:3-1", "", "slots '3-1': expected the smaller number first"),
        ("worker-0:", "", "'worker-0:'; expected HOST or HOST:SLOT,SLOT"),
        ("worker-0@worker-0:1", "", "host 'worker-0' stands there twice"),
        ("", "worker-0@worker-1", "leaves no slot of worker-0, worker-1"),
    ],
)
def test_wrong_selections(include, exclude, expected):
    with pytest.raises(LaunchError, match=re.escape(expected)):
        select(HOSTS, include=include, exclude=exclude)


def test_the_first_hosts_and_slots():
    assert first(HOSTS, nodes=1, slots=None) == {"worker-0": (0, 1, 2, 3)}
    assert first(HOSTS, nodes=None, slots=2) == {"worker-0": (0, 1), "worker-1": (0, 1)}
    with pytest.raises(LaunchError, match="--num_nodes 3: there are 2: worker-0, worker-1"):
        first(HOSTS, nodes=3, slots=None)
    with pytest.raises(LaunchError, match="--num_gpus 8: worker-0 has 4"):
        first(HOSTS, nodes=None, slots=8)

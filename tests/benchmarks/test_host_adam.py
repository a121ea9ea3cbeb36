"""Ratios and limits of the race of host optimizers, and jspeed's contestants as they run."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contestants.host_adam_problem import arguments
from benchmarks.cpu_speed import BenchmarkError
from benchmarks.host_adam import better_peer, check_agreement, holds, speed_ratios, table
from benchmarks.interleave import Contestant, Timings, race

DEEPSPEED, TORCH, NUMBA, XLA = (
    "DeepSpeed CPUAdam",
    "torch AdamW, fused",
    "jspeed, numba",
    "jspeed, XLA",
)


def timings(name: str, *seconds: float) -> Timings:
    return Timings(name, {}, seconds, seconds, (1.0,) * len(seconds))


def test_engines_are_held_against_the_better_peer() -> None:
    peers = [timings(DEEPSPEED, 1.0, 2.0, 4.0), timings(TORCH, 3.0, 3.0, 3.0)]
    assert better_peer([timings(NUMBA, 0.1, 0.1, 0.1), *peers]).name == DEEPSPEED
    numba, xla = timings(NUMBA, 1.0, 1.9, 9.0), timings(XLA, 1.6, 3.2, 6.4)
    assert speed_ratios(xla, peers[0]) == [0.625] * 3
    assert holds([*peers, numba, xla])
    assert not holds([*peers, timings(NUMBA, 1.1, 2.1, 3.0), xla])
    assert not holds([*peers, numba, timings(XLA, 1.7, 3.5, 7.0)])


def test_the_table_names_what_it_compares_with() -> None:
    text = table([timings(DEEPSPEED, 1.0, 1.0), timings(NUMBA, 0.5, 0.5)], 10**8)
    header, _, first, second = text.splitlines()
    assert "1e8 elements" in header
    assert f"to {DEEPSPEED}" in header
    assert "0.10" in first
    assert "2.00 to 2.00" in second


def test_parameters_must_agree() -> None:
    first = Timings(TORCH, {}, (1.0,), (1.0,), (5.0,))
    check_agreement([first, Timings(NUMBA, {}, (1.0,), (1.0,), (5.00001,))])
    with pytest.raises(BenchmarkError, match=r"update 0: the parameters of torch.* sum to 5.0"):
        check_agreement([first, Timings(NUMBA, {}, (1.0,), (1.0,), (5.001,))])


def test_both_dtypes_arrive_at_the_same_parameters(tmp_path: Path) -> None:
    runs = [
        Contestant(
            f"{sixteen_bit}",
            (
                sys.executable,
                *arguments(
                    "host_adam_jspeed", "xla", elements=5000, threads=1, sixteen_bit=sixteen_bit
                ),
            ),
            {"JAX_PLATFORMS": "cpu"},
        )
        for sixteen_bit in (False, True)
    ]
    wide, narrow = race(runs, rounds=2, log=tmp_path)
    check_agreement([wide, narrow])
    assert wide.losses[0] != wide.losses[1]


def test_an_unknown_contestant_says_so() -> None:
    command = arguments("host_adam_jspeed", "torch", elements=1, threads=1)
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "kind 'torch'; expected numba or xla." in ran.stderr

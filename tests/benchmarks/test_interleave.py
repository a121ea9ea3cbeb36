"""Contestants take turns, their times are told apart, and a failing one is named."""

import sys
from pathlib import Path

import pytest

from benchmarks.interleave import Contestant, ContestantError, Timings, alternate, race

TOY = """
import sys, time
from benchmarks.interleave import claim_output, serve
output = claim_output()
print("a library says something")
serve(lambda: {step}, {{"version": "{version}"}}, output=output)
"""


def toy(name: str, step: str) -> Contestant:
    return Contestant(name, (sys.executable, "-c", TOY.format(step=step, version=name)), {})


def test_race_times_each_contestant_once_per_round(tmp_path: Path) -> None:
    slow, fast = race(
        [toy("slow", "time.sleep(0.05) or 2.5"), toy("fast", "1.5")], rounds=3, log=tmp_path
    )
    assert (slow.name, fast.name) == ("slow", "fast")
    assert slow.facts == {"version": "slow"}
    assert slow.losses == (2.5,) * 3
    assert fast.losses == (1.5,) * 3
    assert min(slow.seconds) >= 0.05  # sleep never returns early
    assert len(fast.seconds) == len(fast.cpu_seconds) == 3


def test_a_contestant_that_fails_is_named_with_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(ContestantError, match=r"(?s)^bad ended with status 1\..*ZeroDivisionError"):
        race([toy("good", "1.0"), toy("bad", "1 / 0")], rounds=1, log=tmp_path)


def test_a_loss_that_is_not_finite_ends_the_race(tmp_path: Path) -> None:
    with pytest.raises(ContestantError, match=r"^lost: the loss is nan after 0 steps\.$"):
        race([toy("lost", "float('nan')")], rounds=1, log=tmp_path)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine was ten times slower in the last round; medians of each alone would give 3 / 1.
    ours = Timings("ours", {}, (2.0, 3.0, 20.0), (), ())
    theirs = Timings("theirs", {}, (1.0, 1.0, 10.0), (), ())
    assert ours.ratios_to(theirs) == [2.0, 3.0, 2.0]
    assert ours.ratio_to(theirs) == 2.0
    assert ours.median() == 3.0


def test_alternate_turns_the_order_every_round() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) or 1.0 for name in "ab"}
    first, second = alternate(steps, rounds=3)
    assert calls == list("abbaab")
    assert (first.name, second.name) == ("a", "b")
    assert len(first.seconds) == 3

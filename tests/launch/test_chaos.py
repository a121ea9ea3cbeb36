"""A supervised run survives SIGKILLs at random moments and the loss of a host; the script beside
this kills more often."""

from __future__ import annotations

import pytest

from tests.launch.chaos import TOLERANCE, chaos, compare


@pytest.mark.parametrize(
    ("processes", "kills", "steps"),
    [
        pytest.param(2, 1, 60, id="two-then-one"),
        pytest.param(4, 2, 200, marks=pytest.mark.slow, id="four-then-two"),
    ],
)
def test_a_run_that_is_killed_and_loses_a_host_keeps_its_curve(tmp_path, processes, kills, steps):
    """The same bits as long as there are as many processes, then the same to rounding: the batch
    stays, and fewer take over what all saved."""
    alone, killed = chaos(
        tmp_path, processes=processes, kills=kills, seed=3, steps=steps, save_every=5
    )
    log = killed.log.read_text()
    assert len(killed.kills) == kills + 1
    assert "going on without beta" in log
    compared = compare(alone, killed)
    assert compared.differing == ()
    assert 0 < compared.since < steps
    assert compared.furthest < TOLERANCE

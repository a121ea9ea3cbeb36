"""Optimizer state that streams through H200s, as compiled for them: devices hold less by exactly
what is offloaded and the hosts that much more, once; copies run beside each other in the loops."""

from __future__ import annotations

import functools
import re

import pytest

from jspeed.planner.plan import Plan
from jspeed.profile.compiled import Compiled
from tests.gpu_target.planned import plan_and_step

CHUNK = 1_000_000
SMALL = (
    "model.layers=4",
    "model.hidden_size=1024",
    "model.heads=8",
    "model.vocab_size=1024",
    "model.sequence_length=256",
    "data.sequence_length=256",
    "train_batch_size=16",
    "zero_optimization.stage3_param_persistence_threshold=0",
    "zero_optimization.offload_optimizer.update=device",
    f"zero_optimization.sub_group_size={CHUNK}",
)
LAYER = 12 * 1024**2

pytestmark = pytest.mark.gpu_target


@functools.cache
def planned(stage: int, gpus: int, device: str) -> tuple[Plan, Compiled]:
    return plan_and_step(
        gpus,
        *SMALL,
        f"zero_optimization.stage={stage}",
        f"zero_optimization.offload_optimizer.device={device}",
    )


LAYOUTS = [
    (0, 1),
    pytest.param(1, 8, marks=pytest.mark.slow),
    pytest.param(2, 8, marks=pytest.mark.slow),
    pytest.param(3, 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "gpus"), LAYOUTS)
def test_devices_hold_less_by_what_is_offloaded(stage, gpus):
    """Of 14 bytes a parameter 2 stay; at stage 3, where no copy is stored, 12 become 2. The hosts
    have 12, once: no second buffer, no temporary."""
    (without, plain), (offloaded, streamed) = (
        planned(stage, gpus, device) for device in ("none", "cpu")
    )
    parameters = without.state.parameters
    gone = plain.argument_bytes - streamed.argument_bytes
    assert gone == (10 if stage == 3 else 12) * parameters // gpus
    assert streamed.host_bytes == offloaded.memory.host == 12 * parameters // gpus
    assert plain.host_bytes == 0


@pytest.mark.parametrize(("stage", "gpus"), LAYOUTS)
def test_temporaries_stay_under_two_layers(stage, gpus):
    """Beside what the step needs anyway, for chunks of any size: two layers of fp32 weights and
    moments would be 300 MB here."""
    plain, streamed = (planned(stage, gpus, device)[1] for device in ("none", "cpu"))
    more = streamed.temporary_bytes - plain.temporary_bytes
    assert more < 2 * 12 * LAYER
    assert more < 10 * 4 * CHUNK + 2**20


@pytest.mark.parametrize(("stage", "gpus"), LAYOUTS)
def test_chunks_move_both_ways_at_once_inside_loops(stage, gpus):
    """What reads or writes the hosts' memory is asynchronous; in the loops over chunks something
    goes up while something comes down."""
    text = planned(stage, gpus, "cpu")[1].text
    pinned = [line for line in text.splitlines() if "S(5)" in line]
    synchronous = re.compile(r"= \S+ (copy|fusion)\(")
    assert pinned
    assert not [line for line in pinned if synchronous.search(line)]
    loops = [
        body
        for body in text.split("\n\n")
        if not body.lstrip().startswith("ENTRY")
        and re.search(r"dynamic-update-slice-start[\w.]* =", body)
    ]
    assert loops
    for body in loops:
        assert _most_in_flight(body) == {"down", "up"}


def _most_in_flight(body: str) -> set[str]:
    """The directions of the copies that are under way at the same time, where most are."""
    flying: dict[str, str] = {}
    most: set[str] = set()
    for line in body.splitlines():
        found = re.match(r"\s+%(dynamic-(update-)?slice-(start|done)[\w.]*) = ", line)
        if found is None:
            continue
        if found[3] == "start":
            flying[found[1]] = "up" if found[2] else "down"
        else:
            flying.pop(found[1].replace("-done", "-start"), None)
        most = max(most, set(flying.values()), key=len)
    return most

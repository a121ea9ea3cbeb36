"""What frozen weights leave of a step's FLOPs, and of what the ZeRO paper says it sends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from jspeed.cli.plan_page import volume_line
from jspeed.engine.abstract_run import model_factory
from jspeed.engine.freezing import frozen_product_weights
from jspeed.planner.volume import volume
from tests.engine.test_relief import RUN, planned


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_frozen_weight_counts_four(family: str) -> None:
    run = {**RUN, "train_batch_size": 4, "model": {**RUN["model"], "family": family}}
    given = planned(run, 1)
    factory = model_factory(given.config, platform="cpu", remarks=[])
    layout = given.plan.layout
    assert frozen_product_weights(layout) == 0
    # All of them: those that the factory counts six times.
    every = frozen_product_weights(replace(layout, frozen=frozenset(layout.leaves)))
    assert 6 * every == factory.product_flops_per_token()

    some = planned({**run, "trainable": [r"(?!.*mlp).*"]}, 1).plan.layout
    kernels = [leaf for path, leaf in some.leaves.items() if "/mlp/" in path and "kernel" in path]
    weights = sum(math.prod(leaf.shape) for leaf in kernels)
    less = factory.flops_per_token(16) - factory.flops_per_token(16, frozen_product_weights(some))
    assert less == 2 * weights > 0


def test_the_papers_volume_is_left_out_where_something_is_frozen() -> None:
    found = volume([], parameters=10, stage=1, accumulation=1, frozen=True)
    assert found.paper is None
    assert volume_line(found.to_json()) == (
        "0.00 x the parameters over the batch axes, some of which are frozen."
    )

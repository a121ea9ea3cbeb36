"""Adam that is applied in place gives what Adam does that the step applies, in every layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspeed
from jspeed.core.tree import named_leaves
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from jspeed.optim.adam import adam
from pallas_kernels.fused_adamw import fused_adamw
from tests.training.curves import TINY, batches, ds_config

KERNEL = fused_adamw(1e-2, weight_decay=0.1, implementation="triton", interpret=True)
IN_PLACE = adam(1e-2, weight_decay=0.1, applied="in_place")


def run(optimizer, *, stage, steps=4, devices=2, **keys):
    engine = jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=ds_config(stage=stage, micro=8, **keys),
        optimizer=optimizer,
        devices=jax.devices()[:devices],
    )
    metrics = [engine.train_batch(batch) for batch in batches(steps)]
    return engine, metrics


def compare(optimizer, tolerance, **settings):
    plain, expected = run(adam(1e-2, weight_decay=0.1), **settings)
    engine, metrics = run(optimizer, **settings)
    for got, want in zip(metrics, expected, strict=True):
        assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=tolerance)
        assert float(got["grad_norm"]) == pytest.approx(
            float(want["grad_norm"]), rel=max(1e-3, tolerance)
        )
    before = plain.parameters()
    for path, value in engine.parameters().items():
        np.testing.assert_allclose(value, before[path], atol=10 * tolerance, err_msg=path)
    return engine, metrics


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [
        pytest.param(stage, optimizer, marks=[] if quick else pytest.mark.slow)
        for stage in range(4)
        for optimizer, quick in ((IN_PLACE, False), (KERNEL, stage == 2))
    ],
)
def test_losses_and_parameters_are_the_same(stage, optimizer):
    compare(optimizer, 1e-5, stage=stage, gradient_clipping=0.5)


@pytest.mark.slow
def test_copies_in_half_precision_are_the_parameters():
    engine, _ = compare(KERNEL, 2e-2, stage=1, bf16={"enabled": True})
    state = engine.state
    assert state.copies
    master = dict(named_leaves(state.master))
    for path, copy in state.copies.items():
        np.testing.assert_array_equal(copy, master[path].astype("bfloat16"), err_msg=path)


@pytest.mark.slow
def test_a_step_that_overflows_in_fp16_changes_nothing():
    """The largest scale there is overflows in the first step; the count of steps stays too."""
    scaled = {"fp16": {"enabled": True, "initial_scale_power": 40}}
    engine, (metrics,) = run(IN_PLACE, stage=1, steps=1, **scaled)
    fresh, _ = run(IN_PLACE, stage=1, steps=0, **scaled)
    assert not bool(metrics["finite"])
    assert int(engine.state.opt_state.count) == 0
    before, after = named_leaves(fresh.state.master), dict(named_leaves(engine.state.master))
    for path, leaf in before:
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(engine.state.opt_state.mu))


def test_checkpoints_have_the_same_names_and_shapes():
    params = {"w": jnp.ones((2, 3))}
    states = [adam(1e-3, applied=how).init(params) for how in ("by_the_step", "in_place")]
    states.append(KERNEL.init(params))
    names = [[(path, leaf.shape) for path, leaf in named_leaves(state)] for state in states]
    assert names[0] == names[1] == names[2]

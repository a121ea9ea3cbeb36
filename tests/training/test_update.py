"""Adam that is applied in place gives what Adam does that the step applies, in every layout."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jspeed
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from jspeed.optim.adam import adam
from pallas_kernels.fused_adamw import fused_adamw
from tests.training.curves import TINY, batches, ds_config

KERNEL = fused_adamw(1e-2, weight_decay=0.1, implementation="triton", interpret=True)
BF16 = {"bf16": {"enabled": True}}


def run(optimizer, *, stage, steps=5, devices=4, **keys):
    engine = jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=ds_config(stage=stage, micro=2, **keys),
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
        assert float(got["grad_norm"]) == pytest.approx(float(want["grad_norm"]), rel=1e-3)
    before = plain.parameters()
    for path, value in engine.parameters().items():
        np.testing.assert_allclose(value, before[path], atol=10 * tolerance, err_msg=path)
    return engine, metrics


IN_PLACE = adam(1e-2, weight_decay=0.1, applied="in_place")


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [
        (1, KERNEL),
        (2, IN_PLACE),
        pytest.param(0, KERNEL, marks=pytest.mark.slow),
        pytest.param(2, KERNEL, marks=pytest.mark.slow),
        pytest.param(3, KERNEL, marks=pytest.mark.slow),
        pytest.param(0, IN_PLACE, marks=pytest.mark.slow),
        pytest.param(1, IN_PLACE, marks=pytest.mark.slow),
        pytest.param(3, IN_PLACE, marks=pytest.mark.slow),
    ],
)
def test_losses_and_parameters_are_the_same(stage, optimizer):
    compare(optimizer, 1e-5, stage=stage, gradient_clipping=0.5)

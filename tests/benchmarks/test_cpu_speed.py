"""DeepSpeed's environment, agreement of losses, pooled ratios, and the Flax model beside ours."""

import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.cpu_speed import BenchmarkError, Race, check_losses, find_peer, pooled_ratio
from benchmarks.flax_gpt2 import FlaxGPT2, mean_loss
from benchmarks.interleave import Timings
from benchmarks.shapes import SHAPES
from benchmarks.training import make_batch, make_config, make_model, with_weights
from benchmarks.weights import initial_weights
from jspeed.nn import language_model_loss


@pytest.mark.parametrize(
    ("python", "what"),
    [
        ("no-such-python", "no-such-python was not found"),
        (None, "its Python was not found"),
        (sys.executable, "has no DeepSpeed"),
    ],
)
def test_a_missing_peer_says_how_to_make_it(python: str | None, what: str) -> None:
    with pytest.raises(BenchmarkError, match=what) as caught:
        find_peer(python)
    assert "peers/bin/pip install ninja torch transformers deepspeed" in str(caught.value)
    assert "\n" not in str(caught.value)


def timings(name: str, seconds: tuple[float, ...], losses: tuple[float, ...]) -> Timings:
    return Timings(name, {}, seconds, seconds, losses)


def test_losses_must_agree_from_the_beginning() -> None:
    ours = timings("jspeed", (1.0, 1.0), (8.0, 7.0))
    check_losses([ours, timings("DeepSpeed", (1.0, 1.0), (8.001, 7.001))])
    with pytest.raises(BenchmarkError, match=r"step 1: jspeed has loss 7.0, DeepSpeed 7.1;"):
        check_losses([ours, timings("DeepSpeed", (1.0, 1.0), (8.0, 7.1))])


def test_ratios_of_all_seeds_are_pooled() -> None:
    races = [
        Race("base", seed, (timings("a", seconds, (1.0,)), timings("b", (1.0, 1.0), (1.0,))))
        for seed, seconds in enumerate([(1.0, 2.0), (3.0, 9.0)])
    ]
    assert pooled_ratio(races, "a", "b") == 2.5


def test_flax_and_jspeed_compute_the_same_loss_from_the_same_weights() -> None:
    shape = SHAPES["tiny"]
    weights = initial_weights(shape, 0)
    batch = jax.tree.map(jnp.asarray, make_batch(shape, 0))
    model = make_model(make_config(shape, stage=0, devices=1), shape)
    total, weight = language_model_loss(
        with_weights(model(nnx.Rngs(0)), weights), batch, jax.random.key(0)
    )
    flax = mean_loss(FlaxGPT2.with_weights(shape, weights), batch)
    # One forward pass in fp32, its sums in another order.
    assert float(total / weight) == pytest.approx(float(flax), rel=1e-6)
    assert float(flax) == pytest.approx(5.545, abs=0.05)  # ln(256): nothing is learnt yet

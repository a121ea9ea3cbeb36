"""Layers in a loop: their order, and that policies of rematerialisation change no number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jspeed.config import Checkpoint, LayerRange
from jspeed.nn import Linear, LogicalAxes, scan_layers, stack_layers

AXES: LogicalAxes = ("embed", "mlp")


@pytest.mark.parametrize(
    "remat",
    [
        "none",
        "full",
        "dots",
        "attention",
        Checkpoint(save=("layer_in",)),
        Checkpoint(offload=("layer_in",)),
        Checkpoint(layers=3),
        (LayerRange(1, 1, "full"),),
        (LayerRange(0, 0, "dots"), LayerRange(1, 2, Checkpoint(layers=2))),
    ],
)
def test_scanned_layers_are_applied_in_order(remat):
    layers = stack_layers(
        lambda rngs: Linear(4, 4, axes=AXES, stddev=0.5, bias=False, rngs=rngs), 3, nnx.Rngs(0)
    )
    kernels = np.asarray(layers.kernel[...])
    assert kernels.shape == (3, 4, 4)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    out = scan_layers(layers, jnp.asarray(x), lambda layer, x, _: jnp.tanh(layer(x)), remat=remat)
    expected = x
    for kernel in kernels:
        expected = np.tanh(expected @ kernel)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def names(module: nnx.Module) -> dict[str, tuple[str, ...]]:
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {str(path[-1]): variable.get_metadata("logical_axes") for path, variable in state}


def test_stacked_layers_have_a_name_for_their_dimension():
    def make(rngs: nnx.Rngs) -> Linear:
        return Linear(4, 3, 4, axes=("embed", "qkv", "heads"), stddev=0.5, bias=True, rngs=rngs)

    single = {"kernel": ("embed", "qkv", "heads"), "bias": ("qkv", "heads")}
    stacked = {name: ("layers", *axes) for name, axes in single.items()}
    assert names(make(nnx.Rngs(0))) == single
    layers = stack_layers(make, 3, nnx.Rngs(0))
    assert names(layers) == stacked

    def call(layer: Linear, x: jax.Array, _: bool) -> jax.Array:
        assert names(layer) == single  # a slice has no dimension of layers
        return layer(x).sum(1)

    scan_layers(layers, jnp.ones((2, 4)), call, remat="none")
    assert names(layers) == stacked

"""`fused_adamw` as an optax transformation: `optax.adamw`'s results, by `update` and by `apply`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.fused_adamw import fused_adamw

SHAPES = {"embedding": (37, 21), "layer": {"bias": (16,)}}
SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 5)


def tree(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda one: isinstance(one, tuple)  # noqa: E731
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def distance(a, b):
    return max(
        float(jnp.max(jnp.abs(x - y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("rate", [1e-2, SCHEDULE])
def test_five_steps_are_those_of_optax(rate):
    ours = fused_adamw(rate, weight_decay=0.1, implementation="triton", interpret=True)
    theirs = optax.adamw(rate, weight_decay=0.1)
    params = added = expected = tree(0)
    state, added_state, expected_state = ours.init(params), ours.init(params), theirs.init(params)
    apply, update = jax.jit(ours.apply), jax.jit(ours.update)
    for step in range(1, 6):
        gradients = tree(step)
        new, state = apply(gradients, state, params)
        params = new.params
        updates, added_state = update(gradients, added_state, added)
        added = optax.apply_updates(added, updates)
        updates, expected_state = theirs.update(gradients, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert distance(params, tree(0)) > 1e-2
    assert distance(params, expected) < 1e-6
    assert distance(added, expected) < 1e-6
    assert int(state.count) == 5


def test_l2_decay_is_that_of_adam_with_decay_added_to_the_gradient():
    ours = fused_adamw(1e-2, weight_decay=0.1, decay="l2", implementation="triton", interpret=True)
    theirs = optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-2))
    params = expected = tree(0)
    state, expected_state = ours.init(params), theirs.init(params)
    apply = jax.jit(ours.apply)
    for step in range(1, 4):
        new, state = apply(tree(step), state, params)
        params = new.params
        updates, expected_state = theirs.update(tree(step), expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert distance(params, expected) < 1e-6


def test_it_chains_as_any_optax_transformation():
    ours = optax.chain(optax.clip_by_global_norm(1.0), fused_adamw(1e-2))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    params, gradients = tree(0), tree(1)
    got, _ = ours.update(gradients, ours.init(params), params)
    want, _ = theirs.update(gradients, theirs.init(params), params)
    assert distance(got, want) < 1e-8


def test_factor_and_skip_are_the_steps():
    ours = fused_adamw(1e-2)
    params, gradients = tree(0), tree(1)
    state, apply = ours.init(params), jax.jit(ours.apply)
    scaled = jax.tree.map(lambda g: 1024 * g, gradients)
    plain, _ = apply(gradients, state, params)
    unscaled, after = apply(scaled, state, params, gradient_factor=1 / 1024)
    assert distance(plain.params, unscaled.params) == 0.0
    assert int(after.count) == 1
    kept, after = apply(scaled, state, params, skip=jnp.asarray(True))
    assert distance(kept.params, params) == 0.0
    assert distance(after, state) == 0.0


def test_update_asks_for_parameters():
    ours = fused_adamw(1e-3)
    with pytest.raises(ValueError, match="needs params; they were left out"):
        ours.update(tree(1), ours.init(tree(0)))

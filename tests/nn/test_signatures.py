"""Signatures are checked in tests, and mean plain arrays where jaxtyping is not installed."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from jspeed.nn import causal_attention, cross_entropy, dense, gelu, linear_cross_entropy, swiglu
from jspeed.nn.rope import apply_rope
from jspeed.optim.newton_schulz import orthogonalize


def heads(count: int, seq: int = 4) -> jnp.ndarray:
    return jnp.ones((2, seq, count, 8))


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda: causal_attention(heads(4), heads(2, 5), heads(2, 5)), "key"),
        (lambda: causal_attention(heads(4), heads(2), heads(4)), "value"),
        (lambda: cross_entropy(jnp.ones((2, 3, 5)), jnp.zeros((2, 4), int)), "labels"),
        (lambda: cross_entropy(jnp.ones((2, 5)), jnp.zeros(2)), "labels"),
        (lambda: swiglu(jnp.ones((2, 3)), jnp.ones((3, 2))), "up"),
        (lambda: gelu(jnp.zeros((2, 3), int)), "x"),
        (lambda: dense(jnp.ones((2, 3)), jnp.ones((2, 3))), "kernel"),
        (
            lambda: linear_cross_entropy(
                jnp.ones((6, 3)), jnp.ones((3, 5)), jnp.zeros((2, 3), int), chunk_size=2
            ),
            "labels",
        ),
        (lambda: apply_rope(heads(2), jnp.zeros((3, 4), int), jnp.ones(4)), "positions"),
        (lambda: orthogonalize(jnp.ones(3)), "matrix"),
    ],
)
def test_a_call_with_a_wrong_shape_names_the_argument(call, wrong):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"typechecking parameter '{wrong}'"):
        call()


WITHOUT = """
import sys, typing
sys.modules["jaxtyping"] = None
import jax, jspeed.nn, jspeed.optim, jspeed.nn.losses
print(typing.get_type_hints(jspeed.nn.linear_cross_entropy)["labels"] is jax.Array)
"""


def test_without_jaxtyping_the_annotations_are_plain_arrays():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr

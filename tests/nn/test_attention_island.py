"""Attention with the sequence split over `seq` and heads over `tensor` equals plain attention."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.errors import LayoutError
from jspeed.layout.mesh import AUTOMATIC_AXES, make_mesh, resolve_mesh
from jspeed.nn import causal_attention
from jspeed.nn.sequence import in_zigzag_order, shard_sequence

BATCH, SEQ, DIM = 2, 48, 8
METHODS = ("ulysses", "ring", "allgather")


def operands(heads: int, kv_heads: int, length: int = SEQ) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(BATCH, length, count, DIM) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, seed = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return 2 * q, k, v, seed


def documents(length: int = SEQ) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(np.cumsum(rng.random((BATCH, length)) < 0.1, axis=1), jnp.int32)


def in_step(function: Any, mesh: jax.sharding.Mesh) -> Any:
    """A function as the train step calls a model: manual over all axes but the automatic ones."""
    automatic = {axis for axis in AUTOMATIC_AXES if mesh.shape[axis] > 1}
    whole = PartitionSpec()
    return shard_map(
        function,
        mesh=mesh,
        in_specs=whole,
        out_specs=whole,
        axis_names=frozenset(mesh.axis_names) - automatic,
    )


@functools.cache
def results(
    heads: int, kv_heads: int, method: str, seq: int, tensor: int, packed: bool, **more: Any
) -> list[np.ndarray]:
    """Output and gradients, on a mesh or, with `seq` and `tensor` 1, plainly on one device."""
    q, k, v, seed = operands(heads, kv_heads)
    segments = documents() if packed else None

    def both(q: Any, k: Any, v: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            out = causal_attention(
                q, k, v, segment_ids=segments, implementation="xla", sequence_parallel=method
            )
            return (out * seed).sum(), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    devices = seq * tensor
    if devices > 1:
        mesh = make_mesh(
            resolve_mesh(devices=devices, seq=seq, tensor=tensor), jax.devices()[:devices]
        )
        both = in_step(both, mesh)
        split = NamedSharding(mesh, PartitionSpec(None, "seq"))
        q, k, v = (jax.device_put(x, split) for x in (q, k, v))
    return [np.asarray(x) for x in jax.jit(both)(q, k, v)]


def check(heads: int, kv_heads: int, method: str, seq: int, tensor: int, packed: bool) -> None:
    expected = results(heads, kv_heads, "auto", 1, 1, packed)
    got = results(heads, kv_heads, method, seq, tensor, packed)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)  # values up to 10


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("seq", [2, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("method", METHODS)
def test_grouped_queries_over_a_split_sequence(method, seq, packed):
    """2 key and value heads on up to 8 devices."""
    check(8, 2, method, seq, 1, packed)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "seq"),
    [(3, 3, 2), (3, 1, 2), (6, 3, 2), (6, 3, 4), (2, 1, 8), (9, 3, 8), (5, 5, 3)],
)
def test_ulysses_with_heads_that_do_not_divide(heads, kv_heads, seq):
    check(heads, kv_heads, "ulysses", seq, 1, packed=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seq", "tensor"),
    [(8, 4, 2, 2), (8, 2, 2, 4), (12, 3, 2, 2), (3, 3, 2, 2), (4, 2, 1, 4), (12, 4, 1, 6)],
)
def test_heads_split_over_tensor_as_well(method, heads, kv_heads, seq, tensor):
    if method != "ulysses" and seq == 1:
        pytest.skip("without a split sequence there is nothing to choose")
    check(heads, kv_heads, method, seq, tensor, packed=True)


def test_tokens_in_the_rings_own_order():
    """Sorted once, nothing is sent but keys and values; the result is in that order too."""
    q, k, v, _ = operands(4, 2)
    expected = results(4, 2, "auto", 1, 1, False)[0]
    mesh = make_mesh(resolve_mesh(devices=4, seq=4), jax.devices()[:4])
    chunks = np.split(np.arange(SEQ), 8)
    order = np.concatenate([chunks[c] for r in range(4) for c in (r, 7 - r)])

    def attend(q: Any, k: Any, v: Any) -> Any:
        out = causal_attention(q, k, v, sequence_parallel="ring", order="zigzag")
        return out, in_zigzag_order(jnp.arange(SEQ)[None])

    out, tokens = jax.jit(in_step(attend, mesh))(*(x[:, order] for x in (q, k, v)))
    np.testing.assert_array_equal(tokens[0], order)
    np.testing.assert_allclose(out, expected[:, order], atol=1e-5)


def test_only_the_ring_knows_its_order():
    mesh = make_mesh(resolve_mesh(devices=2, seq=2), jax.devices()[:2])
    q, k, v, _ = operands(4, 2)
    with pytest.raises(ValueError, match="zigzag order, which ulysses does not know"):
        jax.eval_shape(in_step(functools.partial(causal_attention, order="zigzag"), mesh), q, k, v)


def test_auto_is_ulysses_unless_devices_would_idle():
    """2 heads on 4 devices: the ring, or gathered keys where its chunks do not divide."""
    mesh = make_mesh(resolve_mesh(devices=4, seq=4), jax.devices()[:4])

    def primitives(heads: int, length: int) -> set[str]:
        arrays = operands(heads, 1, length)[:3]
        text = str(jax.make_jaxpr(in_step(causal_attention, mesh))(*arrays))
        return {name for name in ("all_to_all", "ppermute", "all_gather") if f"{name}[" in text}

    assert primitives(5, 48) == {"all_to_all"}
    assert primitives(2, 48) == {"ppermute"}
    assert primitives(2, 44) == {"all_gather"}


@pytest.mark.parametrize(
    ("shape", "method", "length", "message"),
    [
        ({"seq": 4}, "ulysses", 46,
         '"mesh.seq": 4 does not divide a sequence of 46 tokens. Use sequences of 44 or 48 '
         "tokens."),
        ({"seq": 4}, "ring", 44,
         '"model.attention.sequence_parallel": ring cuts a sequence into 2 x "mesh.seq" = 8 '
         "chunks, which do not divide 44 tokens. Use 40 or 48 tokens."),
        ({"seq": 2, "pipe": 2}, "ring", 48,
         '"model.attention.sequence_parallel": ring cannot run in the branches of a pipeline '
         '("mesh.pipe" above 1), whose permutes would mix. Use "ulysses" or "allgather".'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(shape, method, length, message):
    mesh = make_mesh(resolve_mesh(devices=4, **{"data": -1, **shape}), jax.devices()[:4])
    attend = functools.partial(causal_attention, sequence_parallel=method)
    with pytest.raises(LayoutError) as error:
        jax.eval_shape(in_step(attend, mesh), *operands(4, 2, length)[:3])
    assert str(error.value) == message


def test_activations_stay_split_where_they_can():
    mesh = make_mesh(resolve_mesh(devices=2, seq=2), jax.devices()[:2])
    split = jax.jit(in_step(lambda x: shard_sequence(2 * x), mesh)).lower(jnp.ones((3, 4, 5)))
    assert '[{?}, {"seq"}, {?}]' in split.as_text()
    odd = jax.jit(in_step(lambda x: shard_sequence(2 * x), mesh)).lower(jnp.ones((3, 7, 5)))
    assert '[{?}, {"seq"}, {?}]' not in odd.as_text()
    assert shard_sequence(jnp.ones((3, 4))).shape == (3, 4)  # outside of any mesh

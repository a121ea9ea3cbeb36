"""Which tensors carry names, and what policies do with them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jspeed.config import Checkpoint
from jspeed.config.remat import TENSORS
from jspeed.core._compat import CUDNN_ATTENTION, sub_jaxprs
from jspeed.models import BertConfig, GPT2Config, LlamaConfig, ModelFactory
from jspeed.nn import causal_attention, scan_layers, self_attention, stack_layers, tagged
from jspeed.nn.remat import checkpointed
from pallas_kernels.block_sparse_attention import BigBird
from pallas_kernels.block_sparse_attention.residuals import RESIDUALS

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "layers": 2,
    "hidden_size": 32,
    "heads": 2,
    "intermediate_size": 64,
    "attention": "cpu",
}
FAMILIES = {
    "gpt2": GPT2Config(**SHAPE, sequence_length=16),
    "llama": LlamaConfig(**SHAPE, kv_heads=2, head_dim=16),
    "bert": BertConfig(**SHAPE, sequence_length=16),
}


def names_in(jaxpr: Any) -> Counter[str]:
    """How often each name is given in a jaxpr and all that it holds."""
    found = Counter(eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name")
    for eqn in jaxpr.eqns:
        for inner in sub_jaxprs(eqn):
            found += names_in(inner)
    return found


def count(jaxpr: Any, primitive: str) -> int:
    inner = sum(count(sub, primitive) for eqn in jaxpr.eqns for sub in sub_jaxprs(eqn))
    return inner + sum(eqn.primitive.name == primitive for eqn in jaxpr.eqns)


def products(family: str, policy: Any) -> int:
    """Matrix products of a layer's forward and backward pass."""
    config = dataclasses.replace(FAMILIES[family], remat=policy)
    graph, state = nnx.split(ModelFactory(family, config)(nnx.Rngs(0)))
    ids = jnp.zeros((2, 16), jnp.int32)

    def total(state: Any) -> Any:
        merged: Any = nnx.merge(graph, state)
        return merged.hidden(ids).sum()

    return count(jax.make_jaxpr(jax.grad(total))(state).jaxpr, "dot_general")


@pytest.mark.parametrize(
    ("family", "saved"),
    [
        # Of the four (seven) products with weights, and attention's two, that each layer computes
        # again: those that lead to the tensor and to nothing else that is still needed.
        (
            "gpt2",
            {"attention_qkv": 1, "attention_out": 2, "attention_proj": 1, "layer_mid": 1,
             "mlp_in": 1, "mlp_out": 0, "attention_norm": 0, "mlp_norm": 0, "layer_in": 0},
        ),
        (
            "llama",
            {"attention_qkv": 3, "attention_out": 2, "attention_proj": 1, "layer_mid": 1,
             "mlp_in": 2, "mlp_out": 0, "attention_norm": 0, "mlp_norm": 0, "layer_in": 0},
        ),
        # Its last norm needs the last product's result again.
        (
            "bert",
            {"attention_qkv": 1, "attention_out": 2, "attention_proj": 1, "layer_mid": 1,
             "mlp_in": 1, "mlp_out": 1, "attention_norm": 0, "mlp_norm": 0, "layer_in": 0},
        ),
    ],
)  # fmt: skip
def test_what_is_saved_is_not_computed_again(family, saved):
    full = products(family, "full")
    found = {name: full - products(family, Checkpoint(save=(name,))) for name in saved}
    assert found == saved


def forward_of(model: nnx.Module) -> Any:
    """The forward pass as differentiation sees it, for the names in functions with own rules."""
    graph, state = nnx.split(model)
    ids = jnp.zeros((2, 16), jnp.int32)

    def hidden(state: Any) -> Any:
        merged: Any = nnx.merge(graph, state)
        return merged.hidden(ids)

    return jax.make_jaxpr(lambda state: jax.vjp(hidden, state)[0])(state).jaxpr


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tags_every_tensor(family):
    found = names_in(forward_of(ModelFactory(family, FAMILIES[family])(nnx.Rngs(0))))
    assert set(found) == set(TENSORS)
    assert found["attention_qkv"] == 3
    assert found["attention_out"] == 2  # and the softmax's statistics
    assert found["mlp_in"] == (2 if family == "llama" else 1)


@pytest.mark.parametrize(
    ("implementation", "pattern", "arrays"),
    [
        ("xla", None, 1),  # its gradient needs the weights again, whatever is kept
        ("cpu", None, 2),
        ("blockwise", None, 2),
        ("xla", BigBird(block=16, num_random_blocks=0), 2),
    ],
)
def test_what_attention_keeps_is_tagged_once(implementation, pattern, arrays):
    x = jnp.ones((1, 128, 2, 16))

    def attend(x: jax.Array) -> jax.Array:
        return self_attention(x, x, x, causal=True, pattern=pattern, implementation=implementation)

    found = names_in(jax.make_jaxpr(lambda x: jax.vjp(attend, x)[0])(x).jaxpr)
    assert found == {RESIDUALS: arrays}
    assert RESIDUALS in TENSORS


@pytest.mark.parametrize(
    ("policy", "forwards", "copies"),
    [
        ("full", 2, 0),
        (Checkpoint(save=("attention_out",)), 1, 0),
        (Checkpoint(offload=("attention_out",)), 1, 2),
    ],
)
def test_cudnns_attention_is_known_as_attention_out(policy, forwards, copies, monkeypatch):
    """Traced without a GPU, for which the questions about one are answered here."""
    stablehlo = "jax._src.cudnn.fused_attention_stablehlo"
    for question in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(f"{stablehlo}.{question}", lambda *_, **__: 91200)
    x = jnp.ones((2, 128, 4, 64), jnp.bfloat16)

    def loss(x: jax.Array) -> jax.Array:
        y = jnp.sin(x)
        return jnp.sin(causal_attention(y, y, y, implementation="cudnn")).astype(jnp.float32)

    body = checkpointed(loss, policy)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: body(x).sum()))(x).jaxpr
    assert count(jaxpr, CUDNN_ATTENTION) == forwards
    assert count(jaxpr, "device_put") == copies  # down, and up again, of both arrays at a time


def test_recomputed_attention_keeps_its_arguments_alone():
    x = jnp.ones((1, 64, 2, 16))

    def kept(recompute: bool) -> list[tuple[int, ...]]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return self_attention(q, k, v, causal=True, recompute=recompute)

        leaves = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv)[1], x, x, x))
        return [leaf.shape for leaf in leaves]

    assert kept(True) == [x.shape] * 3
    assert any(shape[-2:] == (64, 64) for shape in kept(False))  # the weights of the softmax


class Noisy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), (8, 8)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return tagged(x + self.dropout(jnp.tanh(x @ self.w[...])), "layer_mid")


@pytest.mark.parametrize("policy", ["full", "dots", Checkpoint(save=("layer_mid",), layers=2)])
def test_dropout_drops_the_same_again_and_something_else_next_time(policy):
    x = jax.random.normal(jax.random.key(1), (4, 8))

    def run(remat: Any) -> list[Any]:
        layers = stack_layers(Noisy, 4, nnx.Rngs(params=0, dropout=1))

        @nnx.jit
        def step(layers: Noisy, x: jax.Array) -> Any:
            def loss(layers: Noisy) -> jax.Array:
                return (scan_layers(layers, x, lambda one, x, _: one(x), remat=remat) ** 2).sum()

            return nnx.value_and_grad(loss)(layers)

        return [jax.tree.leaves(step(layers, x)) for _ in range(2)]

    first, second = run(policy)
    for found, expected in zip((first, second), run("none"), strict=True):
        for one, other in zip(found, expected, strict=True):
            # A few units in the last place of the largest element: fusions round differently.
            assert float(jnp.abs(one - other).max() / jnp.abs(other).max()) < 1e-6
    assert not jnp.allclose(first[0], second[0], rtol=1e-3)

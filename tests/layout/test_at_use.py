"""Gather at use against plain differentiation, on models written in every way that matters.

Each case is a function of whole parameters and a batch. It runs on 4 x 2 virtual devices (data x
tensor) with shards in place of the parameters; loss and gradients must be those of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jspeed.core._compat import shard_map, sub_jaxprs
from jspeed.layout.at_use import Report, call_with_gather_at_use
from jspeed.layout.gather import AtHome, GatherPlan

WIDTH, INNER, LAYERS, BATCH = 16, 24, 4, 8
Params = list[Any]
_WEIGHTS = {
    "wide": (WIDTH, INNER),
    "back": (INNER, WIDTH),
    "wides": (LAYERS, WIDTH, INNER),
    "backs": (LAYERS, INNER, WIDTH),
    "scales": (LAYERS, WIDTH),
    "out": (WIDTH, WIDTH),
    "other": (WIDTH, WIDTH),
    "third": (WIDTH, WIDTH),
    "unused": (WIDTH, 8),
}


def block(x: jax.Array, wide: jax.Array, back: jax.Array) -> jax.Array:
    return x + jax.nn.gelu(x @ wide) @ back


def mean(x: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) ** 2).mean()


def unrolled(p: dict, x: jax.Array) -> jax.Array:
    """Layers in a Python loop over a stack, a parameter used at both ends, one not at all."""
    x = x @ p["out"]
    for layer in range(LAYERS):
        x = block(x, p["wides"][layer], p["backs"][layer]) * p["scales"][layer]
    return mean(x @ p["out"].T)


def scanned(p: dict, x: jax.Array) -> jax.Array:
    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        wide, back, scale = layer
        return block(x, wide, back) * scale, x.sum()

    x, sums = jax.lax.scan(body, x @ p["out"], (p["wides"], p["backs"], p["scales"]))
    return mean(x @ p["other"]) + 0.01 * sums.mean()


def indexed(p: dict, x: jax.Array) -> jax.Array:
    """A loop that takes its layers out of the stack by number."""
    return mean(
        jax.lax.fori_loop(
            0, LAYERS, lambda i, x: block(x, p["wides"][i], p["backs"][i]) * p["scales"][i], x
        )
    )


def shared(p: dict, x: jax.Array) -> jax.Array:
    """A loop whose turns share a parameter, around a stack."""
    x, _ = jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ p["out"]) + x @ w @ p["back"], None), x, p["wides"]
    )
    return mean(x)


def cast_first(p: dict, x: jax.Array) -> jax.Array:
    """Mixed precision by hand: everything is cast, transposed and joined before its use."""
    p = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p)
    joined = jnp.concatenate([p["out"].T, p["other"], p["third"]], axis=1)
    q, k, v = jnp.split(x @ joined, 3, axis=-1)
    return mean(jax.nn.softmax(q @ k.T) @ v)


def checkpointed(p: dict, x: jax.Array) -> jax.Array:
    """Checkpoints of the user's: around a layer, around a loop, and with a policy."""
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    x = jax.checkpoint(block)(x, p["wide"], p["back"])

    def layers(x: jax.Array, wides: jax.Array, backs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (block(x, *w), None), x, (wides, backs))[0]

    x = jax.checkpoint(layers)(x, p["wides"][:2], p["backs"][:2])
    x = jax.checkpoint(layers, policy=saved)(x, p["wides"][2:], p["backs"][2:])
    remat = jax.checkpoint(lambda x, w: (x @ w, None), policy=saved)
    return mean(jax.lax.scan(remat, x, jnp.stack([jnp.eye(WIDTH)] * 2))[0] @ p["out"])


def called(p: dict, x: jax.Array) -> jax.Array:
    """Inside `jit`, shared between two calls of the same function."""
    inner = jax.jit(block)
    return mean(jax.jit(lambda x: inner(inner(x, p["wide"], p["back"]), p["wide"], p["back"]))(x))


def with_rules(p: dict, x: jax.Array) -> jax.Array:
    """Rules of differentiation of the user's own, and a product of two parameters."""

    @jax.custom_vjp
    def linear(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    return mean(jax.nn.silu(linear(x, p["wide"])) @ (p["back"] @ p["out"]))


def branched(p: dict, x: jax.Array) -> jax.Array:
    """Control flow that depends on the batch, integer values and random keys."""
    keep = jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), 3), 0.5, (WIDTH,))
    x = jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w.T, p["out"])
    rows = jnp.argsort(p["other"].sum(1))[:BATCH]
    return mean(x * keep + p["third"][jnp.arange(x.shape[0]) % WIDTH]) + mean(p["other"][rows])


def parameter_alone(p: dict, x: jax.Array) -> jax.Array:
    """A penalty on parameters beside the loss."""
    return mean(x @ p["out"]) + 0.1 * mean(p["out"]) + 0.1 * mean(p["wides"])


def grouped(p: dict, x: jax.Array) -> jax.Array:
    """A loop over groups of layers, each a loop over its layers that a checkpoint encloses."""
    groups = [w.reshape(2, LAYERS // 2, *w.shape[1:]) for w in (p["wides"], p["backs"])]

    @jax.checkpoint
    def group(x: jax.Array, layers: Any) -> tuple[jax.Array, None]:
        return jax.lax.scan(lambda x, w: (block(x, *w), None), x, layers)

    return mean(jax.lax.scan(group, x, tuple(groups))[0] @ p["out"])


CASES = [
    unrolled,
    scanned,
    grouped,
    indexed,
    shared,
    cast_first,
    checkpointed,
    called,
    with_rules,
    branched,
    parameter_alone,
]


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(_WEIGHTS))
    return {
        name: 0.2 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, _WEIGHTS.items(), strict=True)
    }


@pytest.fixture(scope="module")
def batch() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (BATCH, WIDTH))


def sharded_step(
    function: Callable[[dict, jax.Array], jax.Array], names: list[str], *, refetch: bool = True
) -> tuple[Callable[..., Any], Any, Report]:
    """`(shards, batch) -> (loss, gradients)` on a mesh, how the shards lie, and the report."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    report = Report()
    specs, plans = {}, {}
    for name in names:
        ndim = len(_WEIGHTS[name])
        split = ndim - 2 if ndim > 1 and name != "scales" else ndim - 1
        tensor = ndim - 1 if name in ("wide", "wides") else None
        auto = tuple("tensor" if dim == tensor else None for dim in range(ndim))
        plans[name] = GatherPlan(("data",), split - ndim, ("tensor",), auto)
        both = ["data" if dim == split else entry for dim, entry in enumerate(auto)]
        specs[name] = (
            PartitionSpec(*both),
            PartitionSpec(*((e == "data" and e) or None for e in both)),
        )

    def local(shards: dict[str, jax.Array], x: jax.Array):
        def loss(shards: dict[str, jax.Array]) -> jax.Array:
            homes = [AtHome(name, plans[name], shards[name]) for name in names]
            return call_with_gather_at_use(
                lambda values, x: function(dict(zip(names, values, strict=True)), x),
                homes,
                x,
                refetch=refetch,
                report=report,
            )

        value, gradients = jax.value_and_grad(loss)(shards)
        return jax.lax.pmean(value, "data"), jax.tree.map(lambda g: g / 4, gradients)

    manual = {name: spec[1] for name, spec in specs.items()}
    step = shard_map(
        local,
        mesh=mesh,
        in_specs=(manual, PartitionSpec("data")),
        out_specs=(PartitionSpec(), manual),
        axis_names={"data"},
    )
    shardings = {name: NamedSharding(mesh, spec[0]) for name, spec in specs.items()}
    return jax.jit(step), shardings, report


@pytest.mark.parametrize("refetch", [True, False])
@pytest.mark.parametrize("function", CASES, ids=lambda case: case.__name__)
def test_loss_and_gradients_are_those_of_one_device(function, refetch, params, batch):
    def on_one(params: dict) -> jax.Array:  # each quarter of the batch on its own, as on the mesh
        return jnp.stack([function(params, part) for part in jnp.split(batch, 4)]).mean()

    expected, gradients = jax.jit(jax.value_and_grad(on_one))(params)
    step, shardings, _ = sharded_step(function, list(params), refetch=refetch)
    loss, found = step(jax.device_put(params, shardings), batch)
    assert float(loss) == pytest.approx(float(expected), rel=2e-6)
    # Sums over shards in another order: a few units in the last place of the largest element. XLA
    # is free to leave out a rounding to bfloat16 and back.
    tolerance = 1e-2 if function is cast_first else 5e-6
    for name, gradient in gradients.items():
        scale = max(float(jnp.abs(gradient).max()), 1e-3)
        assert np.abs(np.asarray(found[name] - gradient)).max() <= tolerance * scale, name


def count(jaxpr: Any, name: str) -> int:
    """Equations of a kind in a jaxpr and all that it holds, a loop's body counted once."""
    inner = sum(count(sub, name) for eqn in jaxpr.eqns for sub in sub_jaxprs(eqn))
    return inner + sum(eqn.primitive.name == name for eqn in jaxpr.eqns)


def collectives(function: Any, params: dict, batch: jax.Array) -> tuple[int, int]:
    step, _, _ = sharded_step(function, list(params))
    jaxpr = jax.make_jaxpr(step)(params, batch).jaxpr
    return count(jaxpr, "all_gather"), count(jaxpr, "reduce_scatter")


def test_each_use_is_one_gather_a_pass_and_one_reduction(params, batch):
    # 4 layers of (wide, back, scale): 12 gathers forwards and, as all are factors, 12 backwards;
    # `out` is used at both ends: 2 forwards, and backwards only where the other factor needs a
    # gradient, which the batch does not.
    assert collectives(unrolled, params, batch) == (12 + 12 + 2 + 2, 12 + 2)
    # A loop's body is there once: 3 + 3, and `out` and `other` around it.
    assert collectives(scanned, params, batch) == (3 + 3 + 2 + 2, 3 + 2)
    # The same of layers that the loop takes out of the stack by number.
    assert collectives(indexed, params, batch) == (3 + 3, 3)
    # Of groups the inner body's: forwards, again for the group, and backwards.
    assert collectives(grouped, params, batch) == (2 + 2 + 2 + 2, 2 + 1)


def residual_shapes(function: Any, params: dict, batch: jax.Array) -> set[tuple[int, ...]]:
    """The shapes of everything kept between the forward and the backward pass."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    names = list(params)
    shapes: set[tuple[int, ...]] = set()

    def local(shards: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def loss(shards: dict[str, jax.Array]) -> jax.Array:
            homes = [AtHome(n, GatherPlan(("data",), -2), shards[n]) for n in names]
            return call_with_gather_at_use(
                lambda values, x: function(dict(zip(names, values, strict=True)), x),
                homes,
                x,
                refetch=True,
            )

        value, backward = jax.vjp(loss, shards)
        shapes.update(leaf.shape for leaf in jax.tree.leaves(backward))
        return value

    spec = {n: PartitionSpec(*(None,) * (len(w.shape) - 2), "data") for n, w in params.items()}
    jax.eval_shape(
        shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec()),
        params,
        batch,
    )
    return shapes


@pytest.mark.parametrize("function", [cast_first, checkpointed, called, with_rules])
def test_no_whole_weight_is_kept_for_the_backward_pass(function, params, batch):
    used = {name: w for name, w in params.items() if name not in ("scales", "unused")}
    kept = residual_shapes(function, used, batch)
    assert (BATCH, WIDTH) in kept, "the input of the first product is kept, or nothing was seen"
    whole = {w.shape for w in used.values()}
    forms = {shape[::-1] for shape in whole} | {(WIDTH, 3 * WIDTH)}
    assert not kept & (whole | forms)


def test_report_names_what_a_loop_uses_whole(params, batch):
    step, _, report = sharded_step(shared, list(params))
    jax.make_jaxpr(step)(params, batch)
    assert sorted(report.notes) == [
        ("back", "used whole in every turn of a loop"),
        ("out", "used whole in every turn of a loop"),
    ]
    step, _, report = sharded_step(indexed, list(params))
    jax.make_jaxpr(step)(params, batch)
    assert report.notes == []

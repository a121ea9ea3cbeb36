"""The kernel, interpreted, against AdamW in NumPy's float64; and what it refuses."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.fused_adamw import AdamWScalars, fused_adamw, fused_adamw_update
from pallas_kernels.fused_adamw.triton import BLOCK

GRADIENTS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EDGES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 7)
KERNEL = {"implementation": "triton", "interpret": True}


def float64_adamw(gradient, mu, nu, param, s, l2):
    """Kingma & Ba's algorithm 1 with Loshchilov & Hutter's decay, as it is written there."""
    gradient, mu, nu, param = (np.asarray(a, np.float64) for a in (gradient, mu, nu, param))
    if s["skip"]:
        return param, mu, nu
    gradient = gradient * s["gradient_factor"]
    if l2:
        gradient = gradient + s["weight_decay"] * param
    mu = s["beta1"] * mu + (1 - s["beta1"]) * gradient
    nu = s["beta2"] * nu + (1 - s["beta2"]) * gradient**2
    hat1, hat2 = mu / (1 - s["beta1"] ** s["t"]), nu / (1 - s["beta2"] ** s["t"])
    decay = 0 if l2 else s["weight_decay"] * param
    return param - s["learning_rate"] * (hat1 / (np.sqrt(hat2) + s["eps"]) + decay), mu, nu


def random_case(seed):
    rng = np.random.default_rng(seed)
    if seed < len(EDGES):
        shape = (EDGES[seed],)
    else:
        shape = tuple(rng.integers(1, 40, size=rng.integers(0, 4)))
    s = {
        "learning_rate": 10 ** rng.uniform(-5, -1),
        "beta1": rng.uniform(0.0, 0.99),
        "beta2": rng.uniform(0.8, 0.9999),
        "eps": 10 ** rng.uniform(-10, -4),
        "weight_decay": rng.choice([0.0, 0.1]),
        "gradient_factor": 10 ** rng.uniform(-4, 0),
        "skip": float(rng.random() < 0.15),
        "t": int(rng.integers(1, 1000)),
    }
    dtype = rng.choice(list(GRADIENTS))
    arrays = (
        (rng.normal(size=shape) * 10 ** rng.uniform(-2, 3)).astype(GRADIENTS[dtype]),
        rng.normal(size=shape).astype(np.float32),
        np.square(rng.normal(size=shape)).astype(np.float32) + np.float32(1e-3),
        rng.normal(size=shape).astype(np.float32),
    )
    copy = rng.choice([None, "bfloat16", "float16"])
    return arrays, s, rng.choice(["decoupled", "l2"]), copy


def scalars_of(s):
    rates = {name: s[name] for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay")}
    return AdamWScalars(
        **rates,
        rest1=1 - s["beta1"],
        rest2=1 - s["beta2"],
        correction1=1 - s["beta1"] ** s["t"],
        correction2=1 - s["beta2"] ** s["t"],
        gradient_factor=s["gradient_factor"],
        skip=s["skip"],
    )


def check(seed, implementation):
    arrays, s, decay, copy = random_case(seed)
    update = functools.partial(fused_adamw_update, decay=decay, copy_dtypes=copy, **implementation)
    new = jax.jit(update)(*(jnp.asarray(a) for a in arrays), scalars_of(s))
    expected = float64_adamw(*arrays, s, decay == "l2")
    for name, got, want in zip(("param", "mu", "nu"), new[:3], expected, strict=True):
        assert got.shape == want.shape
        error = np.max(np.abs(got - want)) / max(1.0, np.max(np.abs(want)))
        assert error < 2e-6, f"seed {seed}, {name}: {error}"
    # What lies behind the last element never counts as a gradient.
    assert not bool(new.overflow), f"seed {seed}"
    if copy is None:
        assert new.copies is None
    else:
        assert new.copies.dtype == copy
        np.testing.assert_array_equal(new.copies, new.params.astype(copy))


@pytest.mark.parametrize("seed", range(24))
def test_the_kernel_is_adamw(seed):
    check(seed, KERNEL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24, 224))
def test_the_kernel_is_adamw_in_more_cases(seed):
    check(seed, KERNEL)


@pytest.mark.parametrize("seed", range(0, 24, 5))
def test_xla_is_adamw(seed):
    check(seed, {"implementation": "xla"})


@pytest.mark.parametrize(
    ("at", "value"), [(0, np.nan), (BLOCK - 1, np.inf), (BLOCK + 4, -np.inf), (BLOCK + 4, np.nan)]
)
def test_a_gradient_that_is_not_finite_is_seen_and_skipping_keeps_everything(at, value):
    size = BLOCK + 5
    gradient = jnp.ones(size).at[at].set(value)
    mu, nu, param = jnp.full(size, 0.5), jnp.full(size, 0.25), jnp.full(size, 2.0)
    update = jax.jit(functools.partial(fused_adamw_update, **KERNEL))
    for skip in (0.0, 1.0):
        new = update(gradient, mu, nu, param, AdamWScalars(1e-2, skip=skip))
        assert bool(new.overflow)
        if skip:
            for got, before in ((new.mu, mu), (new.nu, nu), (new.params, param)):
                np.testing.assert_array_equal(got, before)
        else:
            others = np.arange(size) != at
            assert np.isfinite(np.asarray(new.params)[others]).all()


def test_nothing_is_compiled_again_when_numbers_change():
    step = jax.jit(functools.partial(fused_adamw_update, **KERNEL))
    arrays = [jnp.ones(10) for _ in range(4)]
    results = [
        step(*arrays, AdamWScalars(*(jnp.float32(x) for x in s)))
        for s in (AdamWScalars(1e-3), AdamWScalars(1e-2, 0.8, 0.9, 0.2, 0.1, 0.5, 0.5, 1e-3, 1.0))
    ]
    assert step._cache_size() == 1
    assert not np.allclose(results[0].params, results[1].params)


def test_each_device_updates_its_own_part():
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )
    specs = {"a": P("data", "tensor"), "b": P(None, ("data", "tensor")), "c": P()}
    shapes = {"a": (8, 6), "b": (3, 16), "c": (5,)}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    rng = np.random.default_rng(0)
    trees = [
        {name: jnp.asarray(rng.random(shape), jnp.float32) for name, shape in shapes.items()}
        for _ in range(4)
    ]
    placed = [jax.tree.map(jax.device_put, tree, shardings) for tree in trees]
    scalars = AdamWScalars(1e-2, weight_decay=0.1)
    step = jax.jit(
        lambda *trees: fused_adamw_update(
            *trees, scalars, shardings=shardings, copy_dtypes=COPIES, **KERNEL
        )
    )
    got = step(*placed)
    want = fused_adamw_update(*trees, scalars, implementation="xla")
    for name in shapes:
        for part in ("params", "mu", "nu"):
            np.testing.assert_allclose(getattr(got, part)[name], getattr(want, part)[name], 1e-6)
        assert got.params[name].sharding.is_equivalent_to(shardings[name], len(shapes[name]))
    assert got.copies["b"] is None
    assert got.copies["a"].dtype == "bfloat16"
    assert not bool(got.overflow)
    # The flag alone travels.
    text = step.lower(*placed).compile().as_text()
    travelled = re.findall(r"= (\S+) (?:all-|reduce-scatter|collective)[\w-]*\(", text)
    assert set(travelled) <= {"s32[1]{0}", "s32[]"}
    # One device's gradient is enough.
    bad = {**placed[0], "a": placed[0]["a"].at[7, 5].set(np.nan)}
    assert bool(step(bad, *placed[1:]).overflow)


COPIES = {"a": "bfloat16", "b": None, "c": "float16"}


@pytest.mark.parametrize("jitted", [True, False])
def test_arrays_that_say_where_they_lie_need_no_shardings(jitted):
    """On Explicit axes, as of `jax.make_mesh`; gradients and moments may lie elsewhere."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    split = NamedSharding(mesh, P("data", "tensor"))
    params = {"w": jax.device_put(jnp.ones((8, 6)), split), "b": jnp.ones(3)}
    others = [{"w": jnp.full((8, 6), value), "b": jnp.full(3, value)} for value in (1.0, 2.0, 3.0)]
    update = functools.partial(fused_adamw_update, scalars=AdamWScalars(1e-2), **KERNEL)
    run = jax.jit(update) if jitted else update
    with jax.set_mesh(mesh):
        got = run(*others, params)
        text = jax.jit(update).lower(*others, params).compile().as_text()
    assert "all-gather" not in text
    assert got.params["w"].sharding.is_equivalent_to(split, 2)
    want = fused_adamw_update(
        *others, jax.tree.map(np.asarray, params), AdamWScalars(1e-2), implementation="xla"
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def test_empty_arrays_are_left_alone():
    empty = [jnp.zeros((0, 3)) for _ in range(4)]
    new = fused_adamw_update(*empty, AdamWScalars(1e-3), copy_dtypes="bfloat16", **KERNEL)
    assert new.params.shape == (0, 3)
    assert new.copies.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": {"w": jnp.ones(4)}}, r"mu\['w'\]: shape \(4,\); expected \(3,\), its parameter's."),
        ({"nu": {"v": jnp.ones(3)}}, r"nu: expected the structure of params"),
        ({"params": {"w": jnp.ones(3, jnp.bfloat16)}}, r"params\['w'\]: dtype bfloat16; expected"),
        ({"gradients": {"w": jnp.ones(3, jnp.int32)}}, r"gradients\['w'\]: dtype int32; expected"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    names = ("gradients", "mu", "nu", "params")
    trees = {**{name: {"w": jnp.ones(3)} for name in names}, **change}
    with pytest.raises(ValueError, match=message):
        fused_adamw_update(*(trees[name] for name in names), AdamWScalars(1e-3))


def test_copies_and_shardings_are_for_every_parameter():
    trees = [{"w": jnp.ones(3), "v": jnp.ones(2)} for _ in range(4)]
    with pytest.raises(ValueError, match="copy_dtypes: 1 for 2 parameters"):
        fused_adamw_update(*trees, AdamWScalars(1e-3), copy_dtypes={"w": "bfloat16"})
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(ValueError, match="shardings: 1 for 2 parameters"):
        fused_adamw_update(*trees, AdamWScalars(1e-3), shardings={"w": NamedSharding(mesh, P())})


@pytest.mark.parametrize("given", ["bf16", jnp.int8, "int8", [None, "bool"]])
def test_copies_are_of_floating_dtypes(given):
    trees = [[jnp.ones(3), jnp.ones(4)]] * 4
    with pytest.raises(ValueError, match=r"copy_dtypes: .*; expected a floating dtype, such as"):
        fused_adamw_update(*trees, AdamWScalars(1e-3), copy_dtypes=given)


def test_decay_is_one_of_two():
    arrays = [jnp.ones(3)] * 4
    with pytest.raises(ValueError, match=r"decay: 'L2'; expected \"decoupled\" or \"l2\""):
        fused_adamw_update(*arrays, AdamWScalars(1e-3), decay="L2")
    with pytest.raises(ValueError, match=r"decay: 'none'; .* a weight_decay of 0"):
        fused_adamw(1e-3, decay="none")

"""Every optimizer against its formula in NumPy, in double precision, over several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.optim import base_learning_rate, make_betas_schedule, make_optimizer

Tree = dict[str, np.ndarray]
Formula = Callable[..., tuple[np.ndarray, Any]]
STEPS = 6
# float32 arithmetic against double precision; Adam's first steps divide by sqrt(v) near 0
RTOL, ATOL = 2e-5, 2e-7


def schedule(step: Any) -> Any:
    return 0.02 / (step + 1)


def adam(p, g, s, t, lr, b1, b2, eps, wd, decoupled=True, corrected=True):
    m, v = s or (0, 0)
    if not decoupled:
        g = g + wd * p
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    c1, c2 = (1 - b1**t, 1 - b2**t) if corrected else (1, 1)
    p = p - lr * (m / c1) / (np.sqrt(v / c2) + eps) - (lr * wd * p if decoupled else 0)
    return p, (m, v)


def lamb(p, g, s, t, lr, b1, b2, eps, wd, low=0.01, high=10.0, inside=False, corrected=True):
    m, v = s or (0, 0)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    u = m / (np.sqrt(v + eps) if inside else np.sqrt(v) + eps) + wd * p
    size, length = np.linalg.norm(p), np.linalg.norm(u)
    trust = min(max(size / length, low), high) if size and length else 1.0
    if corrected:
        lr = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
    return p - lr * trust * u, (m, v)


def lion(p, g, s, t, lr, b1, b2, wd):
    m = 0 if s is None else s
    return p - lr * (np.sign(b1 * m + (1 - b1) * g) + wd * p), b2 * m + (1 - b2) * g


def adagrad(p, g, s, t, lr, eps=1e-10, wd=0.0, decay=0.0, initial=0.0):
    total = np.full_like(p, initial) if s is None else s
    g = g + wd * p
    total = total + g * g
    return p - lr / (1 + (t - 1) * decay) * g / (np.sqrt(total) + eps), total


def sgd(p, g, s, t, lr, momentum=0.0, dampening=0.0, wd=0.0, nesterov=False):
    g = g + wd * p
    if not momentum:
        return p - lr * g, None
    buffer = g if s is None else momentum * s + (1 - dampening) * g
    return p - lr * (g + momentum * buffer if nesterov else buffer), buffer


def run_formula(formula: Formula, params: Tree, gradients: list[Tree], **settings: Any) -> Tree:
    out = {}
    for name, value in params.items():
        p, state = value.astype(np.float64), None
        for i, step in enumerate(gradients):
            p, state = formula(
                p, step[name].astype(np.float64), state, i + 1, schedule(i), **settings
            )
        out[name] = p
    return out


def run_optimizer(tx: optax.GradientTransformation, params: Tree, gradients: list[Tree]) -> Any:
    current: Any = jax.tree.map(jnp.asarray, params)
    state = tx.init(current)
    update = jax.jit(tx.update)
    for step in gradients:
        updates, state = update(step, state, current)
        current = optax.apply_updates(current, updates)
    return current, state


def random_problem(seed: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tree, list[Tree]]:
    rng = np.random.default_rng(seed)

    def tree(scale: float) -> Tree:
        return {f"w{i}": scale * rng.normal(size=s).astype("f") for i, s in enumerate(shapes)}

    return tree(0.5), [tree(10.0 ** rng.integers(-2, 2)) for _ in range(STEPS)]


CASES: list[tuple[str, dict[str, Any], Formula, dict[str, Any]]] = [
    ("Adam", {}, adam, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "wd": 0.0}),
    (
        "Adam",
        {"adam_w_mode": False, "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6},
        adam,
        {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "wd": 0.1, "decoupled": False},
    ),
    (
        "AdamW",
        {"weight_decay": 0.1, "bias_correction": False},
        adam,
        {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "wd": 0.1, "corrected": False},
    ),
    (
        "AdamW",
        {"torch_adam": True},
        adam,
        {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "wd": 0.01},
    ),
    ("FusedAdam", {"weight_decay": 0.3}, adam, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "wd": 0.3}),
    ("Lamb", {"weight_decay": 0.1}, lamb, {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "wd": 0.1}),
    (
        "FusedLamb",
        {"max_coeff": 0.3, "min_coeff": 0.2, "eps_inside_sqrt": True, "bias_correction": False},
        lamb,
        {
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "wd": 0.0,
            "low": 0.2,
            "high": 0.3,
            "inside": True,
            "corrected": False,
        },
    ),
    (
        "Lion",
        {"weight_decay": 0.2, "betas": [0.9, 0.99]},
        lion,
        {"b1": 0.9, "b2": 0.99, "wd": 0.2},
    ),
    ("Adagrad", {}, adagrad, {}),
    (
        "Adagrad",
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
        adagrad,
        {"decay": 0.1, "wd": 0.1, "initial": 0.5, "eps": 1e-3},
    ),
    ("SGD", {"weight_decay": 0.1}, sgd, {"wd": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3}, sgd, {"momentum": 0.9, "dampening": 0.3}),
    (
        "SGD",
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
        sgd,
        {"momentum": 0.8, "nesterov": True, "wd": 0.01},
    ),
]


@pytest.mark.parametrize(("kind", "params", "formula", "constants"), CASES)
def test_steps_follow_the_formula(
    kind: str, params: dict[str, Any], formula: Formula, constants: dict[str, Any]
) -> None:
    values, gradients = random_problem(0, ((3, 5), (7,), (2, 3, 4), ()))
    tx = make_optimizer(type=kind, params=params, learning_rate=schedule)
    got, state = run_optimizer(tx, values, gradients)
    expected = run_formula(formula, values, gradients, **constants)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=RTOL, atol=ATOL, err_msg=name)
    assert int(state.count) == STEPS
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state)), (
        "moments are fp32"
    )


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=2),
    case=st.sampled_from(CASES),
)
def test_random_shapes_and_gradients(seed: int, shapes: list[tuple[int, ...]], case: Any) -> None:
    kind, params, formula, constants = case
    values, gradients = random_problem(seed, tuple(shapes))
    tx = make_optimizer(type=kind, params=params, learning_rate=schedule)
    got, _ = run_optimizer(tx, values, gradients)
    expected = run_formula(formula, values, gradients, **constants)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=10 * RTOL, atol=10 * ATOL)


def test_one_cycle_moves_the_betas_of_adam() -> None:
    """DeepSpeed changes `betas` under way; bias correction then uses the current ones."""
    scheduler = {
        "cycle_min_lr": 0.1,
        "cycle_max_lr": 0.2,
        "cycle_first_step_size": 3,
        "cycle_min_mom": 0.7,
    }
    values, gradients = random_problem(1, ((4, 4),))
    tx = make_optimizer(
        type="Adam",
        params={},
        learning_rate=schedule,
        betas_schedule=make_betas_schedule(
            type="OneCycle", params=scheduler, optimizer_type="Adam"
        ),
    )
    got, _ = run_optimizer(tx, values, gradients)
    beta1 = [0.7, 0.9 - 0.2 / 3, 0.9 - 0.4 / 3, 0.7, 0.9 - 0.4 / 3, 0.9 - 0.2 / 3]
    p, state = values["w0"].astype(np.float64), None
    for i, step in enumerate(gradients):
        g = step["w0"].astype(np.float64)
        p, state = adam(p, g, state, i + 1, schedule(i), beta1[i], 0.99, 1e-8, 0.0)
    np.testing.assert_allclose(got["w0"], p, rtol=RTOL, atol=ATOL)


def test_low_precision_parameters_keep_fp32_moments_and_updates() -> None:
    values = {"w": jnp.ones((3, 4), jnp.bfloat16)}
    tx = make_optimizer(type="AdamW", params={"weight_decay": 0.5}, learning_rate=0.25)
    result: Any = tx.update(values, tx.init(values), values)
    updates, state = result
    assert updates["w"].dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    np.testing.assert_allclose(updates["w"], -0.25 * (1 + 0.5), rtol=1e-5)


@pytest.mark.parametrize("kind", ["AdamW", "Lamb", "Lion", "Adagrad", "SGD", "Muon"])
def test_state_and_parameters_can_be_donated(kind: str) -> None:
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    settings = {"momentum": 0.9} if kind in ("SGD", "Muon") else {}
    tx = make_optimizer(type=kind, params=settings, learning_rate=0.25)

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    params, state = donating(*donating(params, tx.init(params)))
    assert int(state.count) == 2
    assert float(params["b"][0]) < 1.0


def test_stacked_layers_have_their_own_trust_ratio() -> None:
    values, gradients = random_problem(2, ((3, 4, 2),))
    values["w0"][1] *= 30

    def run(stack_fn: Any, leaf: np.ndarray, steps: list[np.ndarray]) -> np.ndarray:
        tx = make_optimizer(type="Lamb", params={}, learning_rate=schedule, stack_fn=stack_fn)
        return run_optimizer(tx, {"w": leaf}, [{"w": g} for g in steps])[0]["w"]

    steps = [g["w0"] for g in gradients]
    stacked = run(lambda path, leaf: 1, values["w0"], steps)
    for layer in range(3):
        alone = run(None, values["w0"][layer], [g[layer] for g in steps])
        np.testing.assert_allclose(stacked[layer], alone, rtol=1e-5)
    assert not np.allclose(run(None, values["w0"], steps), stacked, rtol=1e-2)


def test_untouched_tensors_stay_where_they_are() -> None:
    values = {"zero": np.zeros((3,), "f"), "one": np.ones((2, 2), "f")}
    gradients = [jax.tree.map(np.zeros_like, values)] * 2
    for kind in ("AdamW", "Lamb", "Lion", "Adagrad", "SGD", "Muon"):
        tx = make_optimizer(type=kind, params={}, learning_rate=0.1)
        got, _ = run_optimizer(tx, values, gradients)
        for name, value in values.items():
            np.testing.assert_array_equal(got[name], value, err_msg=f"{kind} {name}")


def test_learning_rate_comes_from_params_unless_given() -> None:
    values, gradients = {"w": np.ones(2, "f")}, [{"w": np.ones(2, "f")}]
    for params, rate, moved in (
        ({"lr": 0.5}, None, 0.5),
        ({"lr": 0.5}, 0.25, 0.25),
        ({}, None, 1e-3),
    ):
        tx = make_optimizer(type="sgd", params=params, learning_rate=rate)
        got, _ = run_optimizer(tx, values, gradients)
        np.testing.assert_allclose(got["w"], 1 - moved, rtol=1e-6)
    defaults = {
        "AdamW": 1e-3,
        "Lamb": 1e-3,
        "Lion": 1e-3,
        "Adagrad": 1e-2,
        "SGD": 1e-3,
        "Muon": 0.02,
    }
    assert {kind: base_learning_rate(type=kind, params={}) for kind in defaults} == defaults
    assert base_learning_rate(type="Muon", params={"lr": 0.3, "muon_lr": 0.1}) == 0.1


@pytest.mark.parametrize("kind", ["Adam", "Lamb", "Lion", "Adagrad", "SGD", "Muon"])
def test_a_given_position_moves_the_schedule_and_not_the_count(kind: str) -> None:
    """The rate is that of the position; the moments' bias is corrected by the optimizer's count."""
    params = {"w": jnp.ones((4, 4))}
    made = make_optimizer(type=kind, params={}, learning_rate=lambda step: 0.1 * (step + 1))
    update = optax.with_extra_args_support(made).update
    usual, _ = update(params, made.init(params), params)
    later, state = update(params, made.init(params), params, schedule_position=jnp.int32(4))
    np.testing.assert_allclose(later["w"], 5 * usual["w"], rtol=1e-6)
    assert int(state.count) == 1


def test_elementwise_optimizers_do_not_communicate() -> None:
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.ones((4, 4)), place)}
    for kind in ("AdamW", "Lion", "Adagrad", "SGD"):
        tx = make_optimizer(type=kind, params={"weight_decay": 0.1}, learning_rate=schedule)
        text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
        assert text is not None
        for collective in ("all-reduce", "all-gather", "reduce-scatter", "collective-permute"):
            assert collective not in text, f"{kind}: {collective}"


@pytest.mark.parametrize("kind", ["AdamW", "Lamb", "Lion", "Adagrad", "SGD", "Muon"])
def test_update_without_params_says_so(kind: str) -> None:
    params = {"w": jnp.ones(3)}
    tx = make_optimizer(type=kind, params={})
    with pytest.raises(ValueError, match="needs params; they were left out"):
        tx.update(params, tx.init(params))

"""Muon's orthogonalisation, its choice of leaves, and its step against NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jspeed.optim import make_optimizer, muon, newton_schulz
from jspeed.optim.muon import is_matrix

orthogonalize = jax.jit(newton_schulz.orthogonalize, static_argnames="method")
orthogonal_step = jax.jit(muon.orthogonal_step, static_argnames="stacked")
SHAPES = [(6, 6), (4, 12), (12, 4), (3, 5, 8), (2, 2, 7, 3)]


def quintic(matrix: np.ndarray) -> np.ndarray:
    """The iteration maps singular values, five times: `3.4445 s - 4.7750 s^3 + 2.0315 s^5`."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    values = values / (np.linalg.norm(values) + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("method", ["gram", "standard"])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_follow_the_quintic(shape: tuple[int, ...], method: str) -> None:
    matrix = np.random.default_rng(0).normal(size=shape).astype("f")
    got = np.asarray(orthogonalize(jnp.asarray(matrix), method=method))
    flat = matrix.reshape(-1, *shape[-2:])
    expected = np.stack([quintic(each) for each in flat]).reshape(shape)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    values = np.linalg.svd(got, compute_uv=False)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_large_scales_and_zeros_are_harmless() -> None:
    matrix = np.random.default_rng(1).normal(size=(4, 9)).astype("f")
    for scale in (1e-4, 1e10):
        np.testing.assert_allclose(
            orthogonalize(jnp.asarray(matrix * scale)), quintic(matrix), atol=1e-3
        )
    np.testing.assert_array_equal(orthogonalize(jnp.zeros((3, 5))), np.zeros((3, 5)))


def test_wide_outputs_are_scaled_up() -> None:
    """A kernel `[in, out]` with out = 4 in is scaled by 2; one with out < in is not."""
    matrix = jnp.asarray(np.random.default_rng(2).normal(size=(3, 12)).astype("f"))
    np.testing.assert_allclose(
        orthogonal_step(matrix, stacked=0), 2 * orthogonalize(matrix), rtol=1e-6
    )
    np.testing.assert_allclose(orthogonal_step(matrix.T, stacked=0), orthogonalize(matrix.T))


def test_convolutions_are_one_matrix_and_stacks_are_many() -> None:
    kernel = jnp.asarray(np.random.default_rng(3).normal(size=(2, 2, 3, 8)).astype("f"))
    as_matrix = orthogonal_step(kernel.reshape(12, 8), stacked=0)
    np.testing.assert_allclose(
        orthogonal_step(kernel, stacked=0), as_matrix.reshape(kernel.shape), rtol=1e-5
    )
    np.testing.assert_allclose(
        orthogonal_step(kernel, stacked=2)[1, 0],
        orthogonal_step(kernel[1, 0], stacked=0),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("blocks/mlp/up/kernel", (4, 8), True),
        ("blocks/mlp/up/kernel", (12, 4, 8), True),
        ("attention_heads/kernel", (4, 8), True),
        ("MultiHeadDotProductAttention_0/query/kernel", (4, 8), True),
        ("blocks/mlp/up/bias", (12, 8), False),
        ("blocks/ln_1/scale", (12, 4), False),
        ("blocks/RMSNorm_0/weight", (12, 4), False),
        ("token_embedding/embedding", (50, 4), False),
        ("Embed_0/table", (50, 4), False),
        ("wte/value", (50, 4), False),
        ("lm_head/kernel", (4, 50), False),
        ("head/kernel", (4, 50), False),
        ("blocks/mlp/up/gain", (8,), False),
    ],
)
def test_default_labels(path: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_matrix(path, np.zeros(shape)) is expected


def problem() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(4)
    shapes = {"embed": (6, 4), "kernel": (4, 8), "stack": (3, 4, 2), "scale": (4,)}

    def tree() -> dict[str, Any]:
        return {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}

    return tree(), [tree() for _ in range(4)]


def run(tx: optax.GradientTransformation, params: Any, gradients: list[Any]) -> Any:
    state = tx.init(params)
    for step in gradients:
        updates, state = jax.jit(tx.update)(step, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_steps_follow_the_formula() -> None:
    params, gradients = problem()
    settings = {"muon_lr": 0.02, "adam_lr": 0.005, "weight_decay": 0.1, "momentum": 0.9}
    got, state = run(make_optimizer(type="Muon", params=settings), params, gradients)

    for name, layers in (("kernel", None), ("stack", 3)):
        p = params[name].astype(np.float64)
        m = np.zeros_like(p)
        for step in gradients:
            g = step[name]
            m = 0.9 * m + 0.1 * g
            blend = 0.1 * g + 0.9 * m
            if layers:
                update = np.stack([quintic(blend[i]) for i in range(layers)])
            else:
                update = quintic(blend) * np.sqrt(2)
            p = p - 0.02 * (update + 0.1 * p)
        np.testing.assert_allclose(got[name], p, atol=3e-6, err_msg=name)

    for name in ("embed", "scale"):
        p, m, v = params[name].astype(np.float64), 0.0, 0.0
        for t, step in enumerate(gradients, 1):
            m, v = 0.9 * m + 0.1 * step[name], 0.95 * v + 0.05 * step[name] ** 2
            u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-10)
            p = p - 0.005 * (u + 0.1 * p)
        np.testing.assert_allclose(got[name], p, atol=3e-6, err_msg=name)

    # Muon's matrices have no second moment
    assert sorted(jax.tree.map(jnp.shape, state.nu).values(), key=str) == [
        (4,),
        (6, 4),
        optax.MaskedNode(),
        optax.MaskedNode(),
    ]


def test_a_schedule_moves_both_halves_in_their_ratio() -> None:
    params = {"kernel": np.ones((2, 2), "f"), "scale": np.ones(3, "f")}

    def moved(settings: dict[str, Any]) -> float:
        tx = make_optimizer(type="Muon", params=settings, learning_rate=lambda step: 0.04)
        return float(params["scale"][0] - run(tx, params, [params])[0]["scale"][0])

    # a first Adam step is the learning rate itself
    assert moved({}) == pytest.approx(0.04 * 3e-4 / 0.02, rel=1e-2)
    assert moved({"lr": 0.02}) == pytest.approx(0.04, rel=1e-4)
    assert moved({"muon_lr": 0.02, "adam_lr": 0.01}) == pytest.approx(0.02, rel=1e-4)


def test_callers_choose_leaves_and_stacks() -> None:
    params, gradients = problem()

    def state(**functions: Any) -> dict[str, bool]:
        tx = make_optimizer(type="Muon", params={}, **functions)
        nu = run(tx, params, gradients)[1].nu
        return {name: isinstance(value, optax.MaskedNode) for name, value in nu.items()}

    only_embed = state(label_fn=lambda path, leaf: path == "embed")
    assert only_embed == {"embed": True, "kernel": False, "stack": False, "scale": False}
    # a stack of vectors is no matrix, whatever its shape
    vectors = state(stack_fn=lambda path, leaf: 1)
    assert vectors == {"embed": False, "kernel": False, "stack": True, "scale": False}

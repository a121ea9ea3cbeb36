"""Every kernel on fresh random inputs against dense formulas in fp32 and fp64."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_gpu.attention import missing
from benchmarks.on_gpu.rows import Clock, Plan, Row, checked, reason_of
from pallas_kernels.block_sparse_attention import (
    BigBird,
    BSLongformer,
    Fixed,
    LocalSlidingWindow,
    block_sparse_attention,
)
from pallas_kernels.block_sparse_attention.reference import reference_attention
from pallas_kernels.rms_norm import add_rms_norm

SECTION = "correctness"
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3, "adamw": 1e-5}

CASES: tuple[dict[str, Any], ...] = (
    {"pattern": BigBird(block=64), "dim": 128, "causal": True, "kv_heads": 2},
    {"pattern": Fixed(block=16), "dim": 64, "segments": True},
    {"pattern": LocalSlidingWindow(block=32), "dim": 128, "padding": True, "causal": True},
    {"pattern": BSLongformer(block=128), "dim": 256, "dtype": "float16"},
    {"pattern": BigBird(block=16), "dim": 80, "segments": True, "padding": True, "causal": True},
    {"pattern": BigBird(block=32), "dim": 64, "dtype": "float32"},
)
"""Sequences of 1,000 tokens end within a block; 4 heads, two sequences."""


def run(plan: Plan, clock: Clock) -> None:
    """Attention, forward and backward, by both kernels, then AdamW and RMSNorm."""
    for number in range(plan.checks):
        for name in ("triton", "mosaic"):
            _check_attention(plan, clock, name, number)
    if not clock.over(SECTION, "fused_adamw", "3 steps"):
        _emit(clock, "fused_adamw", "3 steps", functools.partial(_adamw_error, plan), "adamw")
    for dtype in ("float32", "bfloat16"):
        if not clock.over(SECTION, "rms_norm", dtype):
            _emit(clock, "rms_norm", dtype, functools.partial(_norm_error, plan, dtype), dtype)


def _emit(
    clock: Clock, name: str, problem: str, error_of: Callable[[], float], tolerance: str
) -> None:
    try:
        error = error_of()
    except ModuleNotFoundError as missing:
        clock.emit(Row(SECTION, name, problem, "skipped", note=str(missing)))
    except Exception as failure:
        clock.emit(Row(SECTION, name, problem, "failed", note=reason_of(failure)))
    else:
        clock.emit(checked(SECTION, name, problem, error, TOLERANCE[tolerance]))


def _check_attention(plan: Plan, clock: Clock, name: Any, number: int) -> None:
    case = CASES[number % len(CASES)]
    dtype = case.get("dtype", "bfloat16")
    seq = 200 if plan.smoke else 1000
    pattern = case["pattern"]
    options = [name for name in ("causal", "segments", "padding") if case.get(name)]
    words = [f"{type(pattern).__name__} {pattern.block}", f"dim {case['dim']}", dtype, *options]
    problem = ", ".join(words)
    if clock.over(SECTION, name, problem):
        return
    reason = missing(name, plan)
    if name == "mosaic" and dtype == "float32":
        reason = reason or "float32 is not for Mosaic"
    if reason:
        clock.emit(Row(SECTION, name, problem, "skipped", note=reason))
        return
    errors = functools.partial(_attention_error, plan.seed + number, case, dtype, seq, name, plan)
    _emit(clock, name, problem, errors, dtype)


def _attention_error(
    seed: int, case: dict[str, Any], dtype: str, seq: int, name: Any, plan: Plan
) -> float:
    """The largest relative error of the output and of the three gradients.

    Raises:
      ArithmeticError: a second run gives other bits.
    """
    heads, kv_heads = 4, case.get("kv_heads", 4)
    random = np.random.default_rng(seed)
    q, k, v, grad = (
        jnp.asarray(random.standard_normal((2, seq, count, case["dim"])), dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    others: dict[str, Any] = {"causal": case.get("causal", False)}
    if case.get("segments"):
        ids = np.sort(random.integers(0, 4, (2, seq)), axis=1)
        others["segment_ids"] = jnp.asarray(ids, jnp.int32)
    if case.get("padding"):
        others["key_padding_mask"] = jnp.arange(seq) < jnp.asarray([[seq], [seq // 2]])
    layout = case["pattern"].layout(heads, seq)

    def results(attend: Callable[..., jax.Array], *arrays: jax.Array) -> Sequence[jax.Array]:
        @jax.jit
        def both(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
            out, backward = jax.vjp(lambda *qkv: attend(*qkv, layout, **others), q, k, v)
            return out, *backward(grad)

        return both(*arrays)

    attend = functools.partial(block_sparse_attention, implementation=name, interpret=plan.smoke)
    got, again = (results(attend, q, k, v, grad) for _ in range(2))
    if not all(bool(jnp.array_equal(a, b)) for a, b in zip(got, again, strict=True)):
        raise ArithmeticError("two runs on the same inputs differ")
    wide = [one.astype(jnp.float32) for one in (q, k, v, grad)]
    return max(map(_relative, got, results(reference_attention, *wide)))


def _norm_error(plan: Plan, dtype: str) -> float:
    """Of residual sum, its RMS normalisation and their gradients, against the formulas in fp64.

    Raises:
      ArithmeticError: a second run gives other bits.
    """
    random = np.random.default_rng(plan.seed)
    rows, width, epsilon = (12, 96, 1e-6) if plan.smoke else (1000, 1536, 1e-6)
    x, delta, *grads = (jnp.asarray(random.standard_normal((rows, width)), dtype) for _ in range(4))
    scale = jnp.asarray(random.standard_normal(width), jnp.float32)

    @jax.jit
    def both(x: jax.Array, delta: jax.Array, scale: jax.Array, *grads: jax.Array) -> Any:
        norm = functools.partial(
            add_rms_norm, epsilon=epsilon, implementation="triton", interpret=plan.smoke
        )
        results, backward = jax.vjp(norm, x, delta, scale)
        return *results, *backward(grads)

    got, again = (both(x, delta, scale, *grads) for _ in range(2))
    if not all(bool(jnp.array_equal(a, b)) for a, b in zip(got, again, strict=True)):
        raise ArithmeticError("two runs on the same inputs differ")
    total = np.asarray(x + delta, np.float64)  # rounded as it is kept
    d_total, d_normed = (np.asarray(one, np.float64) for one in grads)
    rstd = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + epsilon)
    normed, scaled = total * rstd, d_normed * np.asarray(scale, np.float64)
    dx = d_total + rstd * (scaled - normed * (scaled * normed).mean(-1, keepdims=True))
    right = total, normed * np.asarray(scale, np.float64), dx, dx, (d_normed * normed).sum(0)
    return max(map(_relative, got, right))


def _relative(got: Any, right: Any) -> float:
    a, b = np.asarray(got, np.float64), np.asarray(right, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def _adamw_error(plan: Plan) -> float:
    """Of parameters and moments after three steps, against the formulas in fp64."""
    room = importlib.import_module("pallas_kernels.fused_adamw")
    random = np.random.default_rng(plan.seed)
    rate, beta1, beta2, eps, decay = 1e-2, 0.9, 0.999, 1e-8, 0.1
    shapes = [(257, 33), (4096,)]
    state: dict[str, list[Any]] = {
        name: [np.zeros(shape) for shape in shapes] for name in ("mu", "nu")
    }
    params = [np.float32(random.standard_normal(shape)) for shape in shapes]
    mine: Any = tuple(
        [jnp.asarray(one, jnp.float32) for one in leaves]
        for leaves in (state["mu"], state["nu"], params)
    )
    right: list[Any] = [one.astype(np.float64) for one in params]
    for step in range(1, 4):
        gradients = [jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in shapes]
        corrections = 1 - beta1**step, 1 - beta2**step
        scalars = room.AdamWScalars(
            rate,
            correction1=corrections[0],
            correction2=corrections[1],
            eps=eps,
            weight_decay=decay,
        )
        mu, nu, params = mine
        new = room.fused_adamw_update(
            gradients, mu, nu, params, scalars, implementation="triton", interpret=plan.smoke
        )
        mine = (new.mu, new.nu, new.params)
        for i, gradient in enumerate(np.asarray(one, np.float64) for one in gradients):
            state["mu"][i] = beta1 * state["mu"][i] + (1 - beta1) * gradient
            state["nu"][i] = beta2 * state["nu"][i] + (1 - beta2) * gradient**2
            m, n = state["mu"][i] / corrections[0], state["nu"][i] / corrections[1]
            right[i] -= rate * (m / (np.sqrt(n) + eps) + decay * right[i])
    pairs = zip(jax.tree.leaves(mine), [*state["mu"], *state["nu"], *right], strict=True)
    return max(_relative(got, expected) for got, expected in pairs)

"""Times of attention in JAX: this project's kernels, and cuDNN's dense one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.on_gpu.problems import flops, layout_of, least_bytes
from benchmarks.on_gpu.rows import Attention, Clock, Plan, Row, reason_of
from benchmarks.on_gpu.timing import measure, sets_needed
from pallas_kernels import _dispatch
from pallas_kernels.block_sparse_attention import block_sparse_attention

SECTION = "attention"
OURS = ("triton", "mosaic")


def run(plan: Plan, clock: Clock) -> None:
    """All problems forward, then those with gradients."""
    for backward in (False, True):
        for problem in plan.attention:
            if not backward or problem.backward:
                _run_problem(plan, clock, problem, backward)


def problem_name(problem: Attention, backward: bool) -> str:
    """What rows of one problem have in common, here and in torch."""
    return f"{problem.name}{', forward and backward' if backward else ''}"


def _run_problem(plan: Plan, clock: Clock, problem: Attention, backward: bool) -> None:
    layout, name = layout_of(problem), problem_name(problem, backward)
    sparse = flops(problem, layout, backward=backward)
    dense = flops(problem, _dense_layout(problem), backward=backward)
    for contestant in (*OURS, "cudnn"):
        if clock.over(SECTION, contestant, name):
            continue
        reason = missing(contestant, plan)
        if reason:
            clock.emit(Row(SECTION, contestant, name, "skipped", note=reason))
            continue
        try:
            attend = _function(contestant, problem, layout, plan)
            sets = _sets(plan, problem)
            median, spread, by = measure(
                _with_gradients(attend) if backward else attend, sets, plan
            )
        except Exception as error:
            clock.emit(Row(SECTION, contestant, name, "failed", note=reason_of(error)))
            continue
        clock.emit(
            Row(
                SECTION,
                contestant,
                name,
                milliseconds=median,
                spread=spread,
                flops=sparse if contestant in OURS else dense,
                bytes=least_bytes(problem, backward=backward),
                clock=by,
                note=f"density {layout.density:.3f}" if contestant in OURS else "no blocks",
            )
        )


def _dense_layout(problem: Attention) -> Any:
    return layout_of(dataclasses.replace(problem, random=0, window=0))


def missing(contestant: str, plan: Plan) -> str:
    """Why a contestant cannot run on this device with this JAX, or nothing."""
    if contestant == "cudnn":
        return "no GPU" if plan.smoke else ""
    if contestant == "mosaic" and not plan.smoke:
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        if capability != "9.0":
            return f"it is for Hopper, compute capability 9.0, and this is {capability}"
    return _dispatch.unavailable("mosaic" if contestant == "mosaic" else "triton") or ""


def _function(contestant: str, problem: Attention, layout: Any, plan: Plan) -> Callable[..., Any]:
    if contestant == "cudnn":
        return functools.partial(
            jax.nn.dot_product_attention, implementation="cudnn", is_causal=problem.causal
        )
    implementation: Any = contestant
    return lambda q, k, v: block_sparse_attention(
        q,
        k,
        v,
        layout,
        causal=problem.causal,
        implementation=implementation,
        interpret=plan.smoke,
    )


def _with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, backward = jax.vjp(attend, q, k, v)
        return backward(out)  # a gradient as good as any, and no more memory

    return both


def _sets(plan: Plan, problem: Attention) -> list[tuple[jax.Array, ...]]:
    shape = (1, problem.seq, problem.heads, problem.dim)

    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key, 3))

    first = one(jax.random.key(plan.seed))
    keys = jax.random.split(jax.random.key(plan.seed + 1), sets_needed(plan, first))
    return [first, *(one(key) for key in keys[1:])]

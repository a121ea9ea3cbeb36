"""Times of an AdamW step in JAX: the fused kernel, and optax as XLA compiles it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.on_gpu.rows import Clock, Plan, Row, reason_of
from benchmarks.on_gpu.timing import measure_steps

SECTION = "adamw"
BYTES = 28
"""Per parameter: three fp32 arrays read and written, a bf16 gradient read, a bf16 copy written."""
RATE, DECAY = 1e-4, 0.1


def run(plan: Plan, clock: Clock) -> None:
    """One row for each way of doing the same step."""
    for name, make in (("fused_adamw", _fused), ("optax.adamw", _optax)):
        if clock.over(SECTION, name, "step"):
            continue
        try:
            step, state = make(plan)
            median, spread, by = measure_steps(step, state, plan)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError)
            status = "skipped" if missing else "failed"
            clock.emit(Row(SECTION, name, "step", status, note=reason_of(error)))
            continue
        finally:
            step = state = None
        elements = sum(math.prod(shape) for shape in plan.parameters)
        clock.emit(
            Row(
                SECTION,
                name,
                "step",
                milliseconds=median,
                spread=spread,
                bytes=float(BYTES * elements),
                clock=by,
                note=f"{elements / 1e6:.0f}M parameters in {len(plan.parameters)} arrays",
            )
        )


def _arrays(plan: Plan) -> dict[str, list[jax.Array]]:
    def normal(kind: int, dtype: Any, scale: float) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(plan.seed + kind), len(plan.parameters))
        return [
            scale * jax.random.normal(key, shape, dtype)
            for key, shape in zip(keys, plan.parameters, strict=True)
        ]

    return {
        "params": normal(0, jnp.float32, 0.02),
        "mu": normal(1, jnp.float32, 1e-3),
        "nu": [jnp.square(one) for one in normal(2, jnp.float32, 1e-3)],
        "gradients": normal(3, jnp.bfloat16, 1e-3),
    }


def _fused(plan: Plan) -> tuple[Callable[[Any], Any], Any]:
    room = importlib.import_module("pallas_kernels.fused_adamw")
    arrays = _arrays(plan)
    gradients = arrays["gradients"]
    scalars = room.AdamWScalars(RATE, weight_decay=DECAY)

    def update(gradients: Any, state: Any) -> Any:
        mu, nu, params, _ = state
        new = room.fused_adamw_update(
            gradients,
            mu,
            nu,
            params,
            scalars,
            copy_dtypes="bfloat16",
            implementation="triton",
            interpret=plan.smoke,
        )
        return new.mu, new.nu, new.params, new.copies

    copies = [one.astype(jnp.bfloat16) for one in arrays["params"]]
    state = (arrays["mu"], arrays["nu"], arrays["params"], copies)
    compiled = jax.jit(update, donate_argnums=1).lower(gradients, state).compile()
    return lambda state: compiled(gradients, state), state


def _optax(plan: Plan) -> tuple[Callable[[Any], Any], Any]:
    import optax

    arrays = _arrays(plan)
    gradients = arrays["gradients"]
    optimizer = optax.adamw(RATE, weight_decay=DECAY)

    def update(gradients: Any, state: Any) -> Any:
        params, inner, _ = state
        wide = [one.astype(jnp.float32) for one in gradients]
        updates, inner = optimizer.update(wide, inner, params)
        params: Any = optax.apply_updates(params, updates)
        return params, inner, [one.astype(jnp.bfloat16) for one in params]

    copies = [one.astype(jnp.bfloat16) for one in arrays["params"]]
    state = (arrays["params"], optimizer.init(arrays["params"]), copies)
    compiled = jax.jit(update, donate_argnums=1).lower(gradients, state).compile()
    return lambda state: compiled(gradients, state), state

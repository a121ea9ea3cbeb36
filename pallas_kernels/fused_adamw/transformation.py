"""AdamW as an optax transformation that can also apply itself in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pallas_kernels._dispatch import Implementation
from pallas_kernels.fused_adamw.api import AdamWUpdate, fused_adamw_update
from pallas_kernels.fused_adamw.reference import AdamWScalars, WeightDecay, adamw_step, check_decay


class FusedAdamWState(NamedTuple):
    """Steps taken (int32 scalar) and the float32 moments, shaped as the parameters."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any


class InPlaceTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation with a third function, which applies the step where the state lies.

    `update` returns what to add to the parameters, as optax wants it; a kernel that wrote that
    would have the parameters read and written once more. `apply` returns the new parameters:

        apply(gradients, state, params, *, gradient_factor=1.0, skip=None, copy_dtypes=None,
              shardings=None, **extra) -> (AdamWUpdate, state)

    with `gradient_factor` a float32 scalar that multiplies all gradients first, `skip` a bool
    scalar that leaves everything as it was, and the others as for `fused_adamw_update`.
    """

    apply: Callable[..., tuple[AdamWUpdate, Any]]

    def __new__(cls, init: Any, update: Any, apply: Any) -> InPlaceTransformation:
        self = super().__new__(cls, init, update)
        self.apply = apply
        return self


def adamw_in_place(
    scalars: Callable[[Any, dict[str, Any]], AdamWScalars],
    *,
    decay: WeightDecay,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Callable[..., tuple[AdamWUpdate, Any]]:
    """The `apply` of an `InPlaceTransformation` that computes AdamW.

    Args:
      scalars: `(state, extra) -> AdamWScalars` of the step that follows `state`; the factor and
        `skip` are put in here.
      decay: see `WeightDecay`.
      implementation: see `fused_adamw_update`.
      interpret: run the kernel without a GPU.

    Returns:
      A function of states that are named tuples with `count`, `mu` and `nu`.
    """

    def apply(
        gradients: Any,
        state: Any,
        params: Any,
        *,
        gradient_factor: Any = 1.0,
        skip: Any = None,
        copy_dtypes: Any = None,
        shardings: Any = None,
        **extra: Any,
    ) -> tuple[AdamWUpdate, Any]:
        skipped = jnp.asarray(False if skip is None else skip)
        step = scalars(state, extra)._replace(gradient_factor=gradient_factor, skip=skipped)
        new = fused_adamw_update(
            gradients,
            state.mu,
            state.nu,
            params,
            step,
            decay=decay,
            copy_dtypes=copy_dtypes,
            shardings=shardings,
            implementation=implementation,
            interpret=interpret,
        )
        count = jnp.where(skipped, state.count, state.count + 1)
        return new, state._replace(count=count, mu=new.mu, nu=new.nu)

    return apply


def fused_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    *,
    decay: WeightDecay = "decoupled",
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> InPlaceTransformation:
    """AdamW with `optax.adamw`'s parameters and results, which can be applied in one pass.

        optimizer = fused_adamw(1e-3)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            gradients = jax.grad(loss)(params, batch)
            new, state = optimizer.apply(gradients, state, params)
            return new.params, state

    As part of `optax.chain`, or through `update` and `optax.apply_updates`, it is plain XLA, which
    makes one kernel of both and moves as many bytes as `apply` does.

    Args:
      learning_rate: a number, or a schedule of the number of steps taken.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the square root.
      weight_decay: its strength, times the learning rate.
      decay: decoupled from the gradient as in AdamW, or added to it.
      implementation: of `apply`, see `fused_adamw_update`.
      interpret: run the kernel of `apply` without a GPU.

    Raises:
      ValueError: `decay` is neither of these.
    """
    check_decay(decay)

    def init(params: Any) -> FusedAdamWState:
        def zeros() -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), params)

        return FusedAdamWState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def scalars(state: FusedAdamWState, extra: Any) -> AdamWScalars:
        del extra
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        steps = state.count + 1
        return AdamWScalars(
            learning_rate=rate,
            beta1=b1,
            beta2=b2,
            rest1=1 - b1,
            rest2=1 - b2,
            correction1=1 - b1**steps,
            correction2=1 - b2**steps,
            eps=eps,
            weight_decay=weight_decay,
        )

    def update(
        updates: Any, state: FusedAdamWState, params: Any = None, **extra: Any
    ) -> tuple[Any, FusedAdamWState]:
        if params is None:
            raise ValueError(
                "fused_adamw: update(gradients, state, params) needs params; they were left out."
            )
        step = functools.partial(adamw_step, s=scalars(state, extra), l2=decay == "l2")
        rows = jax.tree.map(step, updates, state.mu, state.nu, params)
        outer = jax.tree.structure(updates)
        steps, mu, nu = jax.tree.transpose(outer, None, rows)
        return jax.tree.map(jnp.negative, steps), FusedAdamWState(state.count + 1, mu, nu)

    apply = adamw_in_place(scalars, decay=decay, implementation=implementation, interpret=interpret)
    return InPlaceTransformation(init, update, apply)

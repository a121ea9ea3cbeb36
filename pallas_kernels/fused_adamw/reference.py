"""The mathematics of the fused AdamW update of one array, in plain jnp and float32."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

WeightDecay = Literal["decoupled", "l2"]
"""`decoupled` from the gradient (AdamW, arXiv:1711.05101), or added to it (`l2`)."""


def check_decay(decay: str) -> None:
    """Raises a ValueError for what is no `WeightDecay`."""
    if decay not in get_args(WeightDecay):
        raise ValueError(
            f'decay: {decay!r}; expected "decoupled" or "l2". For none, a weight_decay of 0.'
        )


class AdamWScalars(NamedTuple):
    """All numbers of a step; each a Python number or a float32 scalar, so that none of them is
    compiled in.

    Attributes:
      learning_rate: of this step.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      rest1: `1 - beta1`; apart, because float32 would lose digits of it.
      rest2: `1 - beta2`.
      correction1: `1 - beta1^t` of step t = 1, 2, ...; 1 for moments that are not corrected.
      correction2: `1 - beta2^t`, likewise.
      eps: added outside the square root.
      weight_decay: see `WeightDecay`.
      gradient_factor: multiplies the gradient first: unscaling, averaging and clipping in one.
      skip: other than 0 leaves parameters and moments as they are.
    """

    learning_rate: Any
    beta1: Any = 0.9
    beta2: Any = 0.999
    rest1: Any = 0.1
    rest2: Any = 0.001
    correction1: Any = 1.0
    correction2: Any = 1.0
    eps: Any = 1e-8
    weight_decay: Any = 0.0
    gradient_factor: Any = 1.0
    skip: Any = 0.0

    def vector(self) -> jax.Array:
        """As float32 `[11]`, in the order of the attributes."""
        return jnp.stack([jnp.asarray(value, jnp.float32) for value in self])


class LeafUpdate(NamedTuple):
    """What the update of one array gives: its new values, and a flag that has become 1 (int32
    `[1]`) if its gradient was not finite. `copy` is the parameter in another dtype, or None."""

    param: jax.Array
    mu: jax.Array
    nu: jax.Array
    copy: jax.Array | None
    overflow: jax.Array


def adamw_step(
    gradient: jax.Array, mu: jax.Array, nu: jax.Array, param: jax.Array, s: AdamWScalars, l2: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What to take from the parameters, and the new `(mu, nu)`; float32 arrays of one shape."""
    gradient = gradient.astype(jnp.float32) * s.gradient_factor
    if l2:
        gradient = gradient + s.weight_decay * param
    new_mu = s.beta1 * mu + s.rest1 * gradient
    new_nu = s.beta2 * nu + s.rest2 * (gradient * gradient)
    step = (new_mu / s.correction1) / (jnp.sqrt(new_nu / s.correction2) + s.eps)
    if not l2:
        step = step + s.weight_decay * param
    return s.learning_rate * step, new_mu, new_nu


def adamw(
    gradient: jax.Array, mu: jax.Array, nu: jax.Array, param: jax.Array, s: AdamWScalars, l2: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The new `(param, mu, nu)`, or the old ones where the step is skipped."""
    step, new_mu, new_nu = adamw_step(gradient, mu, nu, param, s, l2)
    keep = s.skip != 0
    return (
        jnp.where(keep, param, param - step),
        jnp.where(keep, mu, new_mu),
        jnp.where(keep, nu, new_nu),
    )


def reference_update(
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    param: jax.Array,
    scalars: jax.Array,
    overflow: jax.Array,
    *,
    decay: WeightDecay,
    copy_dtype: Any,
) -> LeafUpdate:
    """The update of one array, as `triton_update` computes it."""
    s = AdamWScalars(*scalars)
    new_param, new_mu, new_nu = adamw(gradient, mu, nu, param, s, decay == "l2")
    bad = ~jnp.all(jnp.isfinite(gradient))
    return LeafUpdate(
        new_param,
        new_mu,
        new_nu,
        None if copy_dtype is None else new_param.astype(copy_dtype),
        jnp.maximum(overflow, bad.astype(jnp.int32)),
    )

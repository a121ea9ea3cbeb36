"""fp16 loss scaling by DeepSpeed's rules, as pure functions of a small state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jspeed.core.errors import ConfigError

_FACTOR = 2.0
# A loss without any gradient never overflows; an infinite scale could not come down again.
_LARGEST = 2.0**127


class LossScaleState(NamedTuple):
    """What changes from step to step; a pytree of scalars.

    Attributes:
        scale: float32, the factor of the loss.
        good_steps: int32, steps since the last overflow.
        hysteresis_left: int32, overflows still tolerated before the scale falls, plus one.
        skipped: int32, all steps skipped so far.
    """

    scale: jax.Array
    good_steps: jax.Array
    hysteresis_left: jax.Array
    skipped: jax.Array


@dataclass(frozen=True)
class LossScale:
    """How the loss is scaled: by a constant (`window` None) or dynamically.

    Dynamic: the scale doubles after `window` overflow-free steps (one more at the start and after
    each overflow, as in DeepSpeed's counting), and halves, not below `min_scale`, at an overflow
    once the hysteresis is used up. The hysteresis is restored when the scale doubles, or by every
    good step with `consecutive_hysteresis`.

    Attributes:
        initial_scale: the first, or the constant, scale.
        window: overflow-free steps between two doublings; None for a constant scale.
        hysteresis: at which overflow, counted from 1, the scale halves.
        consecutive_hysteresis: whether only overflows in a row use up the hysteresis.
        min_scale: the scale never falls below this.
    """

    initial_scale: float = 2.0**16
    window: int | None = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_scale: float = 1.0

    def __post_init__(self) -> None:
        for key, value in (
            ("loss_scale", self.initial_scale),
            ("loss_scale_window", self.window),
            ("hysteresis", self.hysteresis),
            ("min_loss_scale", self.min_scale),
        ):
            if value is not None and not value > 0:
                raise ConfigError(
                    f'"fp16.{key}": {value!r} is not usable; expected a number above 0.'
                )

    @classmethod
    def static(cls, scale: float) -> LossScale:
        """A constant scale; overflowing steps are still skipped and counted."""
        return cls(initial_scale=scale, window=None, min_scale=scale)

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale moves."""
        return self.window is not None

    def init(self) -> LossScaleState:
        """The state before the first step."""
        # Each scalar is an array of its own: donating one buffer twice is an error.
        return LossScaleState(
            scale=jnp.float32(self.initial_scale),
            good_steps=jnp.zeros((), jnp.int32),
            hysteresis_left=jnp.int32(self.hysteresis),
            skipped=jnp.zeros((), jnp.int32),
        )

    def update(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """The state after a step; works inside `jit`.

        Args:
            state: the state that the step was scaled with.
            finite: bool scalar, whether all gradients were finite; if not, the step must be
                skipped.
        """
        after_good = self._after_good_step(state)
        after_overflow = self._after_overflow(state)
        return jax.tree.map(
            lambda good, bad: jnp.where(finite, good, bad), after_good, after_overflow
        )

    def is_exhausted(self, state: LossScaleState, finite: jax.Array) -> jax.Array:
        """Whether a step overflowed with the scale at its minimum (bool scalar).

        DeepSpeed ends the run then; the training loop should too.
        """
        if not self.is_dynamic:
            return jnp.zeros((), bool)
        return ~jnp.asarray(finite) & (state.hysteresis_left <= 1) & (state.scale == self.min_scale)

    def _after_good_step(self, state: LossScaleState) -> LossScaleState:
        steps = state.good_steps + 1
        if self.window is None:
            return state._replace(good_steps=steps)
        # The first step after an overflow, or of the run, does not count towards the window.
        grow = (state.good_steps > 0) & (state.good_steps % self.window == 0)
        restore = jnp.asarray(True) if self.consecutive_hysteresis else grow
        return LossScaleState(
            scale=jnp.where(grow, jnp.minimum(state.scale * _FACTOR, _LARGEST), state.scale),
            good_steps=steps,
            hysteresis_left=jnp.where(restore, self.hysteresis, state.hysteresis_left),
            skipped=state.skipped,
        )

    def _after_overflow(self, state: LossScaleState) -> LossScaleState:
        zero, skipped = jnp.zeros((), jnp.int32), state.skipped + 1
        if self.window is None:
            return state._replace(good_steps=zero, skipped=skipped)
        fall = state.hysteresis_left <= 1
        lower = jnp.maximum(state.scale / _FACTOR, self.min_scale)
        return LossScaleState(
            scale=jnp.where(fall, lower, state.scale),
            good_steps=zero,
            hysteresis_left=jnp.where(fall, state.hysteresis_left, state.hysteresis_left - 1),
            skipped=skipped,
        )

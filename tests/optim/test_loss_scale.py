"""Loss scaling against a plain-Python transcription of DeepSpeed's rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.core.errors import ConfigError
from jspeed.optim import LossScale, LossScaleState


class Rules:
    """DeepSpeed's dynamic scaling, told by iteration numbers, not by counters of good steps."""

    def __init__(self, config: LossScale) -> None:
        self.config = config
        self.scale = config.initial_scale
        self.hysteresis = config.hysteresis
        self.iteration, self.last_overflow, self.skipped = 0, -1, 0
        self.failed = False

    def step(self, finite: bool) -> None:
        config = self.config
        assert config.window is not None
        if not finite:
            self.skipped += 1
            if config.hysteresis == 1 or self.hysteresis == 1:
                self.failed = self.scale == config.min_scale
                self.scale = max(self.scale / 2, config.min_scale)
            else:
                self.hysteresis -= 1
            self.last_overflow = self.iteration
        else:
            if config.consecutive_hysteresis:
                self.hysteresis = config.hysteresis
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % config.window == 0:
                self.hysteresis = config.hysteresis
                self.scale *= 2
        self.iteration += 1


configs = st.builds(
    LossScale,
    initial_scale=st.sampled_from([1.0, 2.0**4, 2.0**16, 3.0]),
    window=st.integers(1, 5),
    hysteresis=st.integers(1, 3),
    consecutive_hysteresis=st.booleans(),
    min_scale=st.sampled_from([1.0, 0.25, 8.0]),
)


@settings(max_examples=80, deadline=None)
@given(config=configs, finite=st.lists(st.sampled_from([True, True, False]), max_size=30))
def test_random_overflows_follow_the_rules(config: LossScale, finite: list[bool]) -> None:
    rules = Rules(config)
    with jax.disable_jit():  # compiling each drawn configuration would take longer than running it
        state = config.init()
        for flag in finite:
            rules.failed = False
            exhausted = config.is_exhausted(state, jnp.asarray(flag))
            state = config.update(state, jnp.asarray(flag))
            rules.step(flag)
            assert bool(exhausted) == rules.failed
            got = (float(state.scale), int(state.hysteresis_left), int(state.skipped))
            assert got == (rules.scale, rules.hysteresis, rules.skipped)


def drive(config: LossScale, finite: list[bool]) -> tuple[list[float], LossScaleState]:
    @jax.jit
    def run(flags: jax.Array) -> tuple[LossScaleState, jax.Array]:
        def body(state: LossScaleState, flag: jax.Array) -> tuple[LossScaleState, jax.Array]:
            state = config.update(state, flag)
            return state, state.scale

        return jax.lax.scan(body, config.init(), flags)

    state, scales = run(jnp.asarray(finite))
    return np.asarray(scales).tolist(), state


def test_scan_inside_jit_keeps_types_and_doubles_after_the_window() -> None:
    config = LossScale(initial_scale=8.0, window=3, hysteresis=1)
    scales, state = drive(config, [True] * 7 + [False] + [True] * 4)
    assert scales == [8, 8, 8, 16, 16, 16, 32, 16, 16, 16, 16, 32]
    assert [leaf.dtype.name for leaf in state] == ["float32", "int32", "int32", "int32"]
    assert (int(state.good_steps), int(state.skipped)) == (4, 1)


def test_hysteresis_forgives_the_first_overflow_until_the_scale_doubles() -> None:
    config = LossScale(initial_scale=64.0, window=2)
    scales, _ = drive(config, [False, False, True, False, True, True, True, False])
    assert scales == [64, 32, 32, 16, 16, 16, 32, 32]


def test_consecutive_hysteresis_forgives_every_single_overflow() -> None:
    config = LossScale(initial_scale=64.0, window=50, consecutive_hysteresis=True)
    scales, _ = drive(config, [False, True, False, True, False, False])
    assert scales == [64, 64, 64, 64, 64, 32]


def test_static_scale_stays_and_counts_skips() -> None:
    config = LossScale.static(128.0)
    scales, state = drive(config, [True, False, False, True])
    assert scales == [128.0] * 4
    assert int(state.skipped) == 2
    assert not config.is_dynamic
    assert not bool(config.is_exhausted(state, jnp.asarray(False)))


def test_scale_stays_finite_so_that_it_can_come_down() -> None:
    config = LossScale(initial_scale=2.0**126, window=1, hysteresis=1)
    scales, _ = drive(config, [True] * 5 + [False])
    assert scales[-2:] == [2.0**127, 2.0**126]


def test_defaults_are_those_of_deepspeed() -> None:
    state = LossScale().init()
    assert (float(state.scale), int(state.hysteresis_left)) == (65536.0, 2)
    assert (LossScale().window, LossScale().min_scale) == (1000, 1.0)


def test_state_can_be_donated() -> None:
    config = LossScale()
    update = jax.jit(config.update, donate_argnums=0)
    state = update(config.init(), jnp.asarray(False))
    assert int(update(state, jnp.asarray(False)).skipped) == 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"window": 0}, '"fp16.loss_scale_window": 0 is not usable; expected a number above 0.'),
        (
            {"min_scale": -1.0},
            '"fp16.min_loss_scale": -1.0 is not usable; expected a number above 0.',
        ),
    ],
)
def test_bad_values_are_refused(settings: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        LossScale(**settings)  # pyright: ignore[reportArgumentType]
    assert str(error.value) == text

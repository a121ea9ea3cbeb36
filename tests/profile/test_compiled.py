"""Compiling: sizes that add up, and a compiler's refusal as one message."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jspeed.profile.compiled import CompileError, compile_lowered


class Refusing:
    """A lowered program that the compiler does not take."""

    def __init__(self, message: str) -> None:
        self._message = message

    def compile(self, options):
        raise jax.errors.JaxRuntimeError(self._message)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 458752\nmore\nlines",
            r"^XLA ran out of what the device has while compiling: RESOURCE_EXHAUSTED: Shared "
            r'memory size limit exceeded: requested 458752 Lower the microbatch, set "model.remat" '
            r'to "full", or split over more devices\.$',
        ),
        ("INTERNAL: bad instruction\nat 3", r"^XLA cannot compile this step: INTERNAL: bad instr"),
    ],
)
def test_a_refusal_of_the_compiler_is_one_line(message, text):
    with pytest.raises(CompileError, match=text) as caught:
        compile_lowered(Refusing(message), {})
    assert "\n" not in str(caught.value)


def test_sizes_are_those_of_the_arrays_and_the_peak_counts_shared_memory_once():
    def step(state, x):
        # Sorts, since XLA hands matrix products on CPUs to a library with memory of its own.
        return state + 1.0, jnp.sort(jnp.sort(x, axis=0), axis=1)[0, 0]

    state = jax.ShapeDtypeStruct((1000,), jnp.float32)
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    compiled = compile_lowered(jax.jit(step, donate_argnums=0).lower(state, x), {})
    assert compiled.argument_bytes == 4000 + 256 * 256 * 4
    assert compiled.alias_bytes == 4000
    results = compiled.output_bytes - compiled.alias_bytes
    assert compiled.peak_bytes == compiled.argument_bytes + results + compiled.temporary_bytes
    assert compiled.temporary_bytes >= 256 * 256 * 4
    assert compiled.live[0].bytes == 256 * 256 * 4
    assert sum(value.bytes for value in compiled.live) <= compiled.temporary_bytes


def test_the_users_compilation_cache_stays_on():
    compile_lowered(jax.jit(lambda x: x + 1).lower(jnp.ones(3)), {})
    assert jax.config.values["jax_enable_compilation_cache"]

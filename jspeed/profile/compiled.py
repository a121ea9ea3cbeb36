"""A program compiled for devices that need not be there, and what the compiler says of it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jspeed.core.errors import JspeedError
from jspeed.profile.buffers import LiveValue, Temporaries, read_temporaries
from jspeed.profile.collectives import Collective, Overlap, collectives, overlaps
from jspeed.profile.hlo import Module, parse_module

_UNTOLD = Temporaries()


class CompileError(JspeedError):
    """XLA could not compile a program."""


@dataclass(frozen=True)
class Compiled:
    """A compiled program; all sizes are bytes on one device.

    Attributes:
      text: of the compiled module.
      sizes: of the mesh axes, in the mesh's order.
      argument_bytes: of its arguments: state and batch.
      output_bytes: of its results, those included that take over an argument's memory.
      alias_bytes: of arguments whose memory results take over.
      temporary_bytes: allocated beside arguments and results, in one piece.
      host_bytes: in the host's memory, of arguments, results and temporaries.
      temporaries: when and where each of them is; empty where the compiler does not tell.
    """

    text: str
    sizes: Mapping[str, int]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    host_bytes: int = 0
    temporaries: Temporaries = _UNTOLD

    @property
    def peak_bytes(self) -> int:
        """What the device must hold while the program runs."""
        results = self.output_bytes - self.alias_bytes
        return self.argument_bytes + results + self.temporary_bytes

    @functools.cached_property
    def live(self) -> tuple[LiveValue, ...]:
        """Temporaries alive at the peak, largest first."""
        return self.temporaries.values_at(self.temporaries.peak[0])

    @functools.cached_property
    def module(self) -> Module:
        """The compiled module, parsed."""
        return parse_module(self.text)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Every array that travels, with the axes it travels over; each branch of a conditional
        counts as taken, so a pipeline's in every turn."""
        return collectives(self.text, self.sizes)

    @functools.cached_property
    def overlaps(self) -> list[Overlap]:
        """What stands between start and end of each asynchronous collective."""
        return overlaps(self.text)


def compile_lowered(
    lowered: Any, sizes: Mapping[str, int], options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compiles what `jax.jit(...).lower(...)` gave.

    Args:
      lowered: for described or real devices.
      sizes: of the mesh axes.
      options: for the compiler, beside those of the jit.

    Raises:
      CompileError: XLA refuses the program, with its reason.
    """
    with tempfile.TemporaryDirectory(prefix="jspeed-xla-") as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": False}
        try:
            compiled = compile_uncached(lowered, {**(options or {}), **dump})
        except jax.errors.JaxRuntimeError as error:
            raise CompileError(_refusal(str(error))) from error
        temporaries = read_temporaries(Path(folder))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, "XLA gave no memory analysis"
    assert text is not None, "XLA gave no program text"
    return Compiled(
        text=text,
        sizes=sizes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        host_bytes=memory.host_argument_size_in_bytes
        + memory.host_temp_size_in_bytes
        + memory.host_output_size_in_bytes
        - memory.host_alias_size_in_bytes,
        temporaries=temporaries,
    )


def compile_uncached(lowered: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Compiles past the persistent cache: without a device the cache can write an executable but
    not read it again, and what is read from it is not dumped.

    Args:
      lowered: from `jax.jit(...).lower(...)`.
      options: for the compiler, beside those of the jit.
    """
    enabled = jax.config.values["jax_enable_compilation_cache"]
    _use_cache(False)
    try:
        return lowered.compile(dict(options) if options else None)
    finally:
        _use_cache(enabled)


def _use_cache(enabled: bool) -> None:
    """JAX asks once whether there is a cache, and remembers."""
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def _refusal(message: str) -> str:
    first = message.strip().splitlines()[0]
    if "RESOURCE_EXHAUSTED" in first:
        return (
            f"XLA ran out of what the device has while compiling: {first} Lower the microbatch, "
            'set "model.remat" to "full", or split over more devices.'
        )
    return f"XLA cannot compile this step: {first}"

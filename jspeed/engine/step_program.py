"""The compiled train step of an engine, and what its devices run of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from jspeed.layout.zero import Layout
from jspeed.pipeline import Schedule
from jspeed.pipeline.program import make_turns
from jspeed.profile.collectives import Collective, collectives
from jspeed.profile.flops import products
from jspeed.profile.hlo import Module, parse_module
from jspeed.profile.owners import Owners
from jspeed.profile.step_flops import Part, StepFlops, parameter_sizes, step_flops
from jspeed.profile.trips import Taken
from jspeed.profile.turns import find_turns


@dataclass(frozen=True)
class StepProgram:
    """A compiled step.

    Attributes:
      text: of the module.
      layout: of the run.
      blueprint: the model, as `Program.blueprint`.
      schedule: of the pipeline's stages, or None.
    """

    text: str
    layout: Layout
    blueprint: Any
    schedule: Schedule | None

    @functools.cached_property
    def module(self) -> Module:
        """The module, parsed."""
        return parse_module(self.text)

    @functools.cached_property
    def owners(self) -> Owners:
        """To which module of the model its instructions belong."""
        return Owners(self.text, self.blueprint, self.layout.leaves, trains=True)

    @functools.cached_property
    def taken(self) -> tuple[Taken | None, ...]:
        """How often branches run, by stage of the pipeline; without one, nothing is known."""
        if self.schedule is None:
            return (None,)
        turns = find_turns(self.module, self.layout.sizes, make_turns(self.schedule))
        return tuple(turns.taken(stage) for stage in range(self.layout.stages))

    def flops(self) -> StepFlops:
        """Its FLOPs by module, on all devices.

        Raises:
          JspeedError: how often a loop runs cannot be told.
        """
        each = self.layout.mesh.size // len(self.taken)
        shapes = {path: leaf.shape for path, leaf in self.layout.leaves.items()}
        return step_flops(
            self.module,
            self.owners,
            parameter_sizes(shapes),
            name="model" if self.blueprint is None else type(self.blueprint).__name__,
            parts=[Part(products(self.module, taken), each) for taken in self.taken],
        )

    def collectives(self) -> list[list[Collective]]:
        """What a device sends and gets in one step, by stage of the pipeline.

        Raises:
          JspeedError: how often a loop runs cannot be told.
        """
        sizes = self.layout.sizes
        found = [collectives(self.module, sizes, taken) for taken in self.taken]
        return [[one for one in stage if one.axes and one.count] for stage in found]


def read_step(
    step: Any, state: Any, batch: Any, layout: Layout, blueprint: Any, schedule: Schedule | None
) -> StepProgram:
    """Compiles a step as it runs, or finds it compiled.

    Args:
      step: from `jax.jit`, or a `CheckedStep`.
      state: arrays, or shapes with shardings.
      batch: placed, or shapes with shardings.
      layout: of the run.
      blueprint: the model, as `Program.blueprint`.
      schedule: of the pipeline's stages, or None.
    """
    with metadata_as_it_is():
        text = step.lower(state, batch).compile().as_text()
    return StepProgram(text, layout, blueprint, schedule)


def shapes_of(tree: Any) -> Any:
    """Shapes with shardings of arrays, to be had when the arrays are gone."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(shape, tree)


@contextmanager
def metadata_as_it_is() -> Iterator[None]:
    """Within it, programs from the compilation cache are of the same sources, names and lines."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[name]
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)

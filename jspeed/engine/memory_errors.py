"""The part of an engine that says who holds what when a device's memory does not do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jspeed.engine.accessors import Accessors
from jspeed.engine.batches import own_share
from jspeed.engine.out_of_memory import WITHOUT_DEVICE, Work, out_of_memory_explained
from jspeed.engine.relief import Given
from jspeed.engine.state_explanation import microbatch_shapes
from jspeed.engine.step_memory import compile_step
from jspeed.profile.compiled import Compiled, compile_lowered
from jspeed.training.state import abstract_state

_REMEMBERED = 8
RUNNING, EVALUATING = "running the training step", "running an evaluation step"


class MemoryErrors(Accessors):
    """What `Engine` has for it."""

    _eval_step: Any
    _one_at_a_time: bool
    _step_shapes: Any = None
    _ran: tuple[Any, ...] = ()

    def wait_at_first(self, program: Any, batch: Any, result: Any) -> None:
        """Waits for a program's first run with batches of these shapes, and for each where programs
        must follow one another.

        Whether its memory can be had is known then; without waiting whoever reads the result would
        be told, and not in the words of `OutOfMemoryError`.
        """
        shapes = (program, *(leaf.shape for leaf in jax.tree.leaves(batch)))
        if self._one_at_a_time or shapes not in self._ran:
            jax.block_until_ready(result)
            self._ran = (*self._ran[-_REMEMBERED:], shapes)

    def out_of_memory_explained(
        self, doing: str, batch: Any = None
    ) -> AbstractContextManager[None]:
        """A block in which what JAX raises for lack of a device's memory becomes an
        `OutOfMemoryError` that says who holds what, and what would help.

        Args:
          doing: for the message; `RUNNING` and `EVALUATING` have their program looked at.
          batch: a pytree of arrays `[rows, ...]`; the last batch of a step when None.
        """
        if doing == RUNNING and batch is not None:
            self._step_shapes = jax.tree.map(_shape, batch)
        return out_of_memory_explained(self._as_given, lambda: self._work(doing, batch))

    def _as_given(self) -> Given:
        return Given(self.config, self._program, self.plan, *self._given)

    def _work(self, doing: str, batch: Any) -> Work:
        if doing == RUNNING and self._step_shapes is not None:
            step = self._step_shapes
            return Work(doing, lambda: self._compiled_step(step), _length(step))
        if doing == EVALUATING:
            shapes = jax.tree.map(_shape, batch)
            rows = jax.tree.leaves(shapes)[0].shape[0] * own_share(self.plan.layout).count
            return Work(doing, lambda: self._compiled_evaluation(shapes), _length(shapes), rows)
        return Work(doing)

    def _compiled_step(self, batch: Any) -> Compiled:
        shapes = microbatch_shapes(batch, self.plan)
        compiled, _ = compile_step(
            self.config, self._program, self._loss_fn, self.plan, shapes, options=self._options()
        )
        return compiled

    def _compiled_evaluation(self, batch: Any) -> Compiled:
        layout, count = self.plan.layout, own_share(self.plan.layout).count

        def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (leaf.shape[0] * count, *leaf.shape[1:])
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch_sharding(shape, 0))

        state = abstract_state(self._program, self.plan.optimizer, layout, self.plan.loss_scale)
        lowered = jax.jit(self._eval_step).lower(state, jax.tree.map(placed, batch))
        return compile_lowered(lowered, layout.sizes, self._options())

    def _options(self) -> Mapping[str, Any] | None:
        mesh = self.plan.layout.mesh
        assert isinstance(mesh, Mesh), "an engine has devices"
        platform = mesh.devices.flat[0].platform
        return WITHOUT_DEVICE if platform in ("gpu", "cuda") else None


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def _length(batch: Any) -> int | None:
    """Of the sequences."""
    return max((leaf.shape[1] for leaf in jax.tree.leaves(batch) if leaf.ndim > 1), default=None)

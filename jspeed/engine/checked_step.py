"""A jitted function whose compiled program is checked before it runs for the first time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jspeed.pipeline.branches import check_branches


class CheckedStep:
    """Calls a jitted function of `(state, batch)`, unless its pipeline could hang.

    Args:
      jitted: from `jax.jit`.
      sizes: of the mesh axes.
    """

    def __init__(self, jitted: Any, sizes: Mapping[str, int]) -> None:
        self._jitted = jitted
        self._sizes = sizes
        self._compiled: dict[Any, Any] = {}

    def __call__(self, state: Any, batch: Any) -> Any:
        leaves, structure = jax.tree.flatten(batch)
        shapes = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if shapes not in self._compiled:
            compiled = self._jitted.lower(state, batch).compile()
            check_branches(compiled.as_text(), self._sizes)
            self._compiled[shapes] = compiled
        return self._compiled[shapes](state, batch)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As that of `jax.jit`."""
        return self._jitted.lower(*args, **kwargs)

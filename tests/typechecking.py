"""How calls are checked against signatures: by beartype, where shapes stand in the signature."""

from __future__ import annotations

from typing import Any

import beartype


def check(function: Any) -> Any:
    """Plain `jax.Array` is left alone: what JAX passes between its own passes may be NumPy's."""
    hints = map(str, getattr(function, "__annotations__", {}).values())
    shapes = any("Float[" in hint or "Int[" in hint for hint in hints)
    return beartype.beartype(function) if shapes else function

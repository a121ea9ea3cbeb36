"""Array types with shapes for signatures: `Float[Array, "batch seq features"]`.

They are jaxtyping's where it is installed, as it is for tests, which check every call by them. It
is no dependency of jspeed: without it the same annotations mean the plain array type.

Linters read a shape that is also a Python expression, as a single name, for one; such
shapes are left to the docstring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class Bool:
            """An array of truth values."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        class Float:
            """An array of floating-point numbers."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        class Int:
            """An array of integers."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]


__all__ = ["Array", "Bool", "Float", "Int"]

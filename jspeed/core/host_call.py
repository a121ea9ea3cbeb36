"""Calls of the host from inside a program on the devices, with NumPy arrays on both sides.

`jax.pure_callback` first puts what it gives to the function on a CPU device. Where the program runs
on such devices itself, that waits for the threads that wait for the function: with eight of them
and JAX 0.10.2 large arguments hang. Here the function gets views of the program's own arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jspeed.core._compat import host_function

_host_call_p = Primitive("host_call")
_host_call_p.multiple_results = True


def host_call(
    function: Callable[..., np.ndarray] | None,
    result: jax.ShapeDtypeStruct,
    *args: jax.Array,
    has_side_effect: bool = False,
) -> jax.Array:
    """Calls a function of the host when the device gets there, and waits for it.

    Calls are ordered by what they take and give alone. Inside a `shard_map` that is manual over all
    axes every device calls for itself.

    Args:
      function: takes NumPy arrays, valid until it returns, and returns one as `result`, which
        nobody may write to while anything refers to it. It must not raise, since other devices
        might wait for this one, nor use JAX. None makes a program that can be compiled and not run.
      result: shape and dtype.
      args: of any shapes.
      has_side_effect: keep the call although nothing needs its result.
    """
    (value,) = _host_call_p.bind(
        *args,
        function=function,
        result=ShapedArray(result.shape, result.dtype),
        has_side_effect=has_side_effect,
    )
    return value


@_host_call_p.def_abstract_eval
def _types(*args: Any, function: Any, result: ShapedArray, has_side_effect: bool) -> Any:
    del args, function, has_side_effect
    return [result]


def _lowered(
    ctx: Any, *args: Any, function: Any, result: ShapedArray, has_side_effect: bool
) -> Any:
    def call(*args: np.ndarray) -> tuple[np.ndarray]:
        value = np.asarray(function(*args))
        assert (value.shape, value.dtype) == (result.shape, result.dtype), "not what was said"
        return (value,)

    target, index = host_function(ctx, None if function is None else call)
    rule: Any = jax.ffi.ffi_lowering(target, has_side_effect=has_side_effect)
    return rule(ctx, *args, index=index)


mlir.register_lowering(_host_call_p, _lowered, cacheable=False)

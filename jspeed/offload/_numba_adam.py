"""Adam compiled by numba. Imported only where numba is there (extra `offload`).

Our own threads take tiles from a counter in shared memory and hold no lock of Python's meanwhile.
Numba's own (`prange`) are no faster here, and two callers at once end the process where its default
layer is used.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.config import DISABLE_JIT  # pyright: ignore[reportAttributeAccessIssue]
from numba.extending import intrinsic

from jspeed.offload._host_memory import host_zeros
from jspeed.offload._scalars import AdamScalars, State

if DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# A tile is what a thread takes at a time; a block's parameters are still in the core's cache when
# they are written out.
_TILE, _BLOCK = 1 << 16, 1 << 12
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
# As numba sees them: it knows neither bfloat16 nor, on CPUs, float16.
_BITS = {
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
    np.dtype(np.float16): np.dtype(np.int16),
}


class NumbaAdam:
    """The kernel on `threads` threads, one of which is the caller's."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), thread_name_prefix="host-adam")

    def zeros(self, length: int) -> np.ndarray:
        """Any memory will do."""
        return host_zeros(length)

    def update(
        self, state: State, gradient: np.ndarray, out: np.ndarray, scalars: AdamScalars
    ) -> None:
        separate = out.ctypes.data != state[0].ctypes.data
        # Read-only arrays are a type of their own; one of the two is enough to compile for.
        gradient = gradient.view(_BITS[gradient.dtype])
        gradient.flags.writeable = False
        counter = np.zeros(1, np.int64)
        work = (*state, gradient, out.view(_BITS[out.dtype]), separate, counter, tuple(scalars))
        tiles = -(-len(gradient) // _TILE)
        helpers = [self._pool.submit(_tiles, *work) for _ in range(min(self._threads, tiles) - 1)]
        _tiles(*work)
        for helper in helpers:
            helper.result()


def _take_code(typing: Any, counter: Any) -> Any:
    """Adds 1 to `counter[0]`, atomically; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(_I64, 1), "monotonic")

    return types.int64(counter), generate


def _widen_code(typing: Any, bits: Any) -> Any:
    """float32 of what `_BITS` made of a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if bits == types.uint16:
            shifted = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
            return builder.bitcast(shifted, _F32)
        if bits == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), _F32)
        return value

    return types.float32(bits), generate


def _narrow_code(typing: Any, value: Any, array: Any) -> Any:
    """The bits of a float32 as `array` holds them; nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = arguments[0]
        if array.dtype == types.uint16:
            return _to_bfloat16(builder, number)
        if array.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), _I16)
        return number

    return array.dtype(value, array), generate


def _to_bfloat16(builder: Any, number: Any) -> Any:
    def constant(bits: int) -> Any:
        return ir.Constant(_I32, bits)

    bits = builder.bitcast(number, _I32)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    # Rounding may carry a NaN's payload into an infinity; a quiet NaN stays one.
    quiet = builder.or_(bits, constant(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", number, number), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, constant(16)), _I16)


_take: Any = intrinsic(_take_code)
_widen: Any = intrinsic(_widen_code)
_narrow: Any = intrinsic(_narrow_code)

# "contract" (fused multiply-add) is the one liberty taken: the others that "fast" mathematics
# takes assume that nothing is infinite or NaN, or approximate the square root.
_OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
    "boundscheck": False,
}


def _compiled(function: Any) -> Any:
    """Compiles on the first call. Numba keeps the machine code beside this file, or else in the
    user's cache folder, under the processor's name and the hash of this file: so whatever goes into
    it stands here."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither place can be written
        return njit(**_OPTIONS)(function)


@_compiled
def _block(master: Any, mu: Any, nu: Any, gradient: Any, scalars: Any) -> None:
    # Not with `out` in the same loop: LLVM would then have to check ten pairs of arrays for
    # overlap, takes that for too many and gives up vectors.
    factor, rate, beta1, rest1, beta2, rest2, scale1, scale2, eps, l2, decay = scalars
    for i in range(master.size):
        p = master[i]
        g = _widen(gradient[i]) * factor
        if l2 != 0:
            g = g + l2 * p
        m = beta1 * mu[i] + rest1 * g
        v = beta2 * nu[i] + rest2 * (g * g)
        step = (m * scale1) / (np.sqrt(v * scale2) + eps)
        if decay != 0:
            step = step + decay * p
        mu[i] = m
        nu[i] = v
        master[i] = p - rate * step


@_compiled
def _publish(master: Any, out: Any) -> None:
    for i in range(master.size):
        out[i] = _narrow(master[i], out)


@_compiled
def _tiles(
    master: Any,
    mu: Any,
    nu: Any,
    gradient: Any,
    out: Any,
    separate: bool,
    counter: Any,
    scalars: Any,
) -> None:
    """Updates tiles for as long as `counter` has any left."""
    while True:
        begin = _take(counter) * _TILE
        if begin >= master.size:
            return
        end = min(begin + _TILE, master.size)
        for a in range(begin, end, _BLOCK):
            b = min(a + _BLOCK, end)
            _block(master[a:b], mu[a:b], nu[a:b], gradient[a:b], scalars)
            if separate:
                _publish(master[a:b], out[a:b])

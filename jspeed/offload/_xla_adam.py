"""Adam compiled by XLA for the host: what there is without numba."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jspeed.offload._host_memory import XlaMemory
from jspeed.offload._scalars import AdamScalars, State

# A tile's results stay in the cache while they are copied into the state. A window is what a thread
# takes at a time and shows JAX at once, since to show an array costs as much as 20,000 elements.
_TILE, _TILES, _SMALLEST = 1 << 19, 4, 1 << 12
_FLOAT32 = np.dtype(np.float32)

Scratch = tuple[jax.Array, ...]


class Window(NamedTuple):
    """`length` elements from `start` on: `tiles` of `size`, or one that is not full."""

    start: int
    length: int
    tiles: int
    size: int


class XlaAdam:
    """State from `zeros` is updated where it is, by one program whose passes XLA shares out among
    its threads.

    Other arrays JAX cannot change, so each tile's results are copied into the state, which takes
    longer. Those that begin at a multiple of 64 bytes are read where they are; of others JAX copies
    each window. Results go to buffers that are used again: fresh memory costs more than the
    arithmetic.
    """

    def __init__(self, threads: int) -> None:
        # An accelerator may be the default; and other processes' CPUs are devices too.
        self._device = jax.local_devices(backend="cpu")[0]
        self._memory = XlaMemory(self._device)
        self._programs: dict[tuple[int, np.dtype, np.dtype, str], Any] = {}
        self._bits: dict[np.dtype, jax.Array] = {}
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), thread_name_prefix="host-adam")
        offsets = np.arange(_TILES, dtype=np.int32) * _TILE
        self._offsets = [jax.device_put(offset, self._device) for offset in offsets]
        self._scratch: dict[tuple[int, np.dtype], list[Scratch]] = {}

    def zeros(self, length: int) -> np.ndarray:
        """A vector for state, in XLA's own memory."""
        return self._memory.zeros(length)

    def update(
        self, state: State, gradient: np.ndarray, out: np.ndarray, scalars: AdamScalars
    ) -> None:
        numbers = jax.device_put(np.array(scalars), self._device)
        decay = "l2" if scalars.l2 else "decoupled" if scalars.decay else "none"
        own = self._memory.arrays(state)
        if own is not None and self._update_in_place(own, state, gradient, out, numbers, decay):
            return
        windows = _windows(len(gradient))
        work = ((*state, gradient), out, numbers, decay, iter(windows))
        self._in_threads(self._tiles, len(windows), *work)

    def _update_in_place(
        self,
        own: tuple[jax.Array, ...],
        state: State,
        gradient: np.ndarray,
        out: np.ndarray,
        numbers: jax.Array,
        decay: str,
    ) -> bool:
        """Updates XLA's own arrays behind `state`; false, and nothing done, where XLA would make
        copies of them."""
        length, dtype = len(gradient), out.dtype
        bits = self._bits.pop(dtype, None)
        if bits is None or len(bits) != length:
            size = 0 if dtype == _FLOAT32 else length
            bits = jnp.zeros(size, jnp.uint16, device=self._device)
        shown = jax.device_put(gradient, self._device)
        key = (length, gradient.dtype, dtype, decay)
        if key not in self._programs:
            lowered = _in_place.lower((own, bits), shown, numbers, dtype=dtype, decay=decay)
            self._programs[key] = lowered.compile()
        program = self._programs[key]
        if program.memory_analysis().alias_size_in_bytes < sum(array.nbytes for array in own):
            return False
        new, bits = jax.block_until_ready(program((own, bits), shown, numbers))
        self._memory.renew(state, new)
        if dtype != _FLOAT32:
            self._copy(np.from_dlpack(bits), out.view(np.uint16))
            self._bits[dtype] = bits
        elif out.ctypes.data != state[0].ctypes.data:
            self._copy(state[0], out)
        return True

    def _copy(self, source: np.ndarray, target: np.ndarray) -> None:
        def part(starts: Iterator[int]) -> None:
            for start in starts:
                target[start : start + _TILE] = source[start : start + _TILE]

        starts = range(0, len(source), _TILE)
        self._in_threads(part, len(starts), iter(starts))

    def _in_threads(self, work: Callable[..., None], pieces: int, *arguments: Any) -> None:
        """Does work in as many threads as there are, if there are pieces of it for all; this one
        takes part."""
        helpers = [
            self._pool.submit(work, *arguments) for _ in range(min(self._threads, pieces) - 1)
        ]
        work(*arguments)
        for helper in helpers:
            helper.result()

    def _tiles(
        self,
        inputs: tuple[np.ndarray, ...],
        out: np.ndarray,
        numbers: jax.Array,
        decay: str,
        windows: Iterator[Window],
    ) -> None:
        """Updates windows for as long as there are any; all threads share the iterator (a
        list's, whose steps are atomic)."""
        targets = [*inputs[:3], out if out.dtype == _FLOAT32 else out.view(np.uint16)]
        for window in windows:
            shown = tuple(self._show(array, window) for array in inputs)
            scratch = self._borrow(window.size, out.dtype)
            for tile in range(window.tiles):
                scratch = _step(
                    scratch, shown, numbers, self._offsets[tile], dtype=out.dtype, decay=decay
                )
                jax.block_until_ready(scratch)
                start = window.start + tile * window.size
                part = slice(start, min(start + window.size, window.start + window.length))
                # In float32 what is published is the master.
                results = scratch if len(scratch) == 4 else (*scratch, scratch[0])
                for target, result in zip(targets, results, strict=True):
                    target[part] = np.from_dlpack(result)[: part.stop - start]
            self._scratch[window.size, out.dtype].append(scratch)

    def _borrow(self, size: int, dtype: np.dtype) -> Scratch:
        """Buffers for a tile's results, from an earlier tile where there are any."""
        free = self._scratch.setdefault((size, dtype), [])
        try:
            return free.pop()
        except IndexError:
            dtypes = [_FLOAT32] * 3 + [np.dtype(np.uint16)] * (dtype != _FLOAT32)
            return tuple(jnp.zeros(size, dtype, device=self._device) for dtype in dtypes)

    def _show(self, array: np.ndarray, window: Window) -> jax.Array:
        """A window of an array as JAX's, whole tiles long."""
        part = array[window.start : window.start + window.length]
        missing = window.tiles * window.size - window.length
        if missing:
            part = np.concatenate([part, np.zeros(missing, array.dtype)])
        return jax.device_put(part, self._device)


def _windows(length: int) -> list[Window]:
    """Windows that cover `length` elements, in few sizes for XLA to compile."""
    whole = _TILE * _TILES
    large = [Window(start, whole, _TILES, _TILE) for start in range(0, length - whole + 1, whole)]
    rest = range(len(large) * whole, length, _TILE)
    pieces = [(start, min(_TILE, length - start)) for start in rest]
    # The last is filled up to a power of two.
    sizes = (max(_SMALLEST, 1 << (piece - 1).bit_length()) for _, piece in pieces)
    return large + [Window(*piece, 1, size) for piece, size in zip(pieces, sizes, strict=True)]


@partial(jax.jit, static_argnames=("dtype", "decay"), donate_argnums=0, keep_unused=True)
def _step(
    scratch: Scratch,
    shown: tuple[jax.Array, ...],
    numbers: jax.Array,
    offset: jax.Array,
    *,
    dtype: np.dtype,
    decay: str,
) -> Scratch:
    """Master, mu, nu and, unless float32, the bits of what is published, of the tile at `offset`;
    in the memory of `scratch`."""
    tiles = (jax.lax.dynamic_slice(array, (offset,), scratch[0].shape) for array in shown)
    *state, gradient = tiles
    new = _adam(state, gradient, AdamScalars(*numbers), decay)
    return new if dtype == _FLOAT32 else (*new, _published(new[0], dtype))


@partial(jax.jit, static_argnames=("dtype", "decay"), donate_argnums=0, keep_unused=True)
def _in_place(
    donated: tuple[tuple[jax.Array, ...], jax.Array],
    gradient: jax.Array,
    numbers: jax.Array,
    *,
    dtype: np.dtype,
    decay: str,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Master, mu and nu, and, unless float32, the bits of what is published; in the memory of those
    before them."""
    state, bits = donated
    new = _adam(state, gradient, AdamScalars(*numbers), decay)
    return new, bits if dtype == _FLOAT32 else _published(new[0], dtype)


def _adam(
    state: Sequence[jax.Array], gradient: jax.Array, s: AdamScalars, decay: str
) -> tuple[jax.Array, ...]:
    """Master, mu and nu after the update."""
    master, mu, nu = state
    gradient = gradient.astype(jnp.float32) * s.factor
    if decay == "l2":
        gradient = gradient + s.l2 * master
    mu = s.beta1 * mu + s.rest1 * gradient
    nu = s.beta2 * nu + s.rest2 * jnp.square(gradient)
    step = (mu * s.scale1) / (jnp.sqrt(nu * s.scale2) + s.eps)
    if decay == "decoupled":
        step = step + s.decay * master
    return master - s.rate * step, mu, nu


def _published(master: jax.Array, dtype: np.dtype) -> jax.Array:
    """The bits of the parameters in 16 bits, since NumPy takes no bfloat16 over DLPack."""
    return jax.lax.bitcast_convert_type(master.astype(dtype), jnp.uint16)

"""Adam and AdamW on the host's cores, in place over arrays that NumPy owns."""

from __future__ import annotations

import os
import time
from typing import Literal

import ml_dtypes
import numpy as np

from jspeed.core.errors import MissingExtraError
from jspeed.offload._host_memory import host_zeros
from jspeed.offload._scalars import AdamRule, Kernel, State, scalars_of

__all__ = ["AdamRule", "Engine", "HostAdam", "State", "host_zeros"]

Engine = Literal["auto", "numba", "xla"]
DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


class HostAdam:
    """Adam (Kingma & Ba, arXiv:1412.6980) with decoupled (AdamW, arXiv:1711.05101) or L2 weight
    decay, for optimizer state in host memory.

    The mathematics is that of `jspeed.optim`'s Adam, in float32; the two differ by rounding. One
    update reads and writes each number of the state once and copies none of it.

    Attributes:
        rule: what was given.
        engine: `numba` or `xla`, what does the work.
        reason: why that one; one line, for logs.
        threads: how many cores an update uses. XLA shares one pool of the process's among all its
            programs; there `threads` bounds how many tiles are in work.

    Args:
        rule: eps, weight decay, and how they apply.
        engine: `auto` takes numba where it can be imported (`pip install "jspeed[offload]"`) and
            otherwise XLA's CPU backend, which takes longer.
        threads: by default as many as this process may use.

    Raises:
        ValueError: an unknown engine or fewer threads than 1.
        MissingExtraError: `numba` was asked for and cannot be imported.

    Example:
        >>> adam = HostAdam(AdamRule(1e-8, 0.1, decoupled=True, bias_corrected=True))
        >>> master, mu, nu = np.ones(3, np.float32), *np.zeros((2, 3), np.float32)
        >>> gradient, out = np.ones(3, ml_dtypes.bfloat16), np.empty(3, ml_dtypes.bfloat16)
        >>> adam.update((master, mu, nu), gradient, out,
        ...     learning_rate=0.25, betas=(0.9, 0.999), count=1, gradient_factor=1.0)
        >>> master
        array([0.725, 0.725, 0.725], dtype=float32)
    """

    def __init__(self, rule: AdamRule, engine: Engine = "auto", threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"HostAdam: threads is {threads}; expected at least 1.")
        self.rule = rule
        self.threads = _usable_cores() if threads is None else threads
        self.engine, self.reason, self._kernel = _choose(engine, self.threads)

    def update(
        self,
        state: State,
        gradient: np.ndarray,
        out: np.ndarray,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        count: int,
        gradient_factor: float,
    ) -> None:
        """Takes one step: changes `state` in place and writes the new parameters to `out`.

        Nothing is checked for finiteness: what is not finite in the gradient gets into the state.

        Args:
            state: master, mu and nu, each a writable contiguous float32 vector.
            gradient: as long as these; float32, bfloat16 or float16.
            out: as long as these, float32, bfloat16 (nearest, ties to even, NaN kept) or float16;
                it may be the master itself, or the memory of the gradient.
            learning_rate: of this step.
            betas: of this step, each at least 0 and below 1.
            count: how many updates there were, this one included; 1 for the first.
            gradient_factor: multiplies the gradient in float32 before anything else (loss scale,
                clipping).

        Raises:
            ValueError: an array or number that does not fit; the state is unchanged.
        """
        _check(state, gradient, out, betas=betas, count=count)
        scalars = scalars_of(
            self.rule,
            learning_rate=float(learning_rate),
            betas=(float(betas[0]), float(betas[1])),
            count=int(count),
            factor=float(gradient_factor),
        )
        if len(gradient):
            self._kernel.update(state, gradient, out, scalars)

    def zeros(self, length: int) -> np.ndarray:
        """A float32 vector of zeros for state, in memory that this engine updates fastest.

        With XLA that is memory of XLA's own, more than twice as fast as any other.
        """
        return self._kernel.zeros(length)

    def prepare(self, gradient: np.dtype, out: np.dtype) -> float:
        """Compiles for these dtypes ahead of the first update; returns the seconds that took."""
        begin = time.perf_counter()
        master, mu, nu = np.zeros((3, 1), np.float32)
        self.update(
            (master, mu, nu),
            np.zeros(1, gradient),
            np.zeros(1, out),
            learning_rate=0.0,
            betas=(0.0, 0.0),
            count=1,
            gradient_factor=1.0,
        )
        return time.perf_counter() - begin


def _choose(engine: str, threads: int) -> tuple[str, str, Kernel]:
    """The engine, why, and its kernel."""
    if engine not in ("auto", "numba", "xla"):
        raise ValueError(f"HostAdam: engine is {engine!r}; expected 'auto', 'numba' or 'xla'.")
    why = "asked for"
    if engine != "xla":
        try:
            from jspeed.offload._numba_adam import NumbaAdam

            return "numba", why if engine == "numba" else "found", NumbaAdam(threads)
        except ImportError as error:
            if engine == "numba":
                raise MissingExtraError(
                    f'HostAdam: engine "numba" needs the package numba, which cannot be imported '
                    f'({error}). Install it with: pip install "jspeed[offload]", or use engine '
                    '"xla".'
                ) from error
            why = (
                f'numba cannot be imported ({error}); pip install "jspeed[offload]" for more speed'
            )

    from jspeed.offload._xla_adam import XlaAdam

    return "xla", why, XlaAdam(threads)


def _check(
    state: State,
    gradient: np.ndarray,
    out: np.ndarray,
    *,
    betas: tuple[float, float],
    count: int,
) -> None:
    arrays = dict(zip(("master", "mu", "nu"), state, strict=True), gradient=gradient, out=out)
    length = len(state[0])
    for name, array in arrays.items():
        allowed = DTYPES if name in ("gradient", "out") else DTYPES[:1]
        if array.dtype not in allowed or array.shape != (length,):
            names = " or ".join(str(dtype) for dtype in allowed)
            raise ValueError(
                f"HostAdam.update: {name} is {array.dtype}{list(array.shape)}; expected a vector "
                f"of {length} {names}, as long as the master."
            )
        if not array.flags.c_contiguous or not (array.flags.writeable or name == "gradient"):
            raise ValueError(
                f"HostAdam.update: {name} must be contiguous and writable; pass np.array of it."
            )
    _check_overlap(arrays)
    if count < 1 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"HostAdam.update: count is {count} and betas are {tuple(betas)}; expected a count of "
            "at least 1 (updates so far, this one included) and betas from 0 up to, not including, "
            "1."
        )


def _check_overlap(arrays: dict[str, np.ndarray]) -> None:
    """Only `out` may share memory, and then all of it: with the master or the gradient."""
    names = list(arrays)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = arrays[first], arrays[second]
            same = a.ctypes.data == b.ctypes.data and a.dtype.itemsize == b.dtype.itemsize
            fine = second == "out" and first in ("master", "gradient") and same
            # Vectors that are contiguous share memory exactly where their bounds overlap.
            if np.may_share_memory(a, b) and not fine:
                raise ValueError(
                    f"HostAdam.update: {first} and {second} overlap in memory; expected arrays of "
                    "their own (out may be the master itself, or the whole gradient's memory)."
                )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

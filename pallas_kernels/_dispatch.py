"""Which implementation of an operation runs.

A named implementation never falls back: where it cannot run, that is an error. None chooses when
the program is lowered, by the platform that it is lowered for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from pallas_kernels import _compat

Implementation = Literal["triton", "mosaic", "xla", "reference"]

_LOGGER = logging.getLogger(__name__)


def unavailable(name: Implementation) -> str | None:
    """Why this JAX cannot run an implementation; None where it can."""
    if name == "triton" and _compat.triton is None:
        return f"JAX {jax.__version__} has no Pallas-Triton backend"
    if name == "mosaic" and _compat.mosaic is None:
        return f"JAX {jax.__version__} has no Pallas Mosaic GPU backend"
    if name == "mosaic" and _compat.JAX_VERSION < (0, 11):
        return f"Mosaic GPU kernels need JAX 0.11 or newer, this is {jax.__version__}"
    return None


def call(
    operation: str,
    implementations: Mapping[Implementation, Callable[..., Any]],
    requested: Implementation | None,
    *operands: Any,
    on_gpu: Implementation = "triton",
    interpret: bool = False,
) -> Any:
    """Calls the implementation asked for, or the best for the platform being lowered for.

    Args:
      operation: its name, for messages.
      implementations: by name; what is missing is not built for these operands.
      requested: by the caller. None: `on_gpu` on NVIDIA GPUs where this JAX has it, `xla`
        elsewhere.
      operands: arrays, or None.
      on_gpu: the choice on GPUs.
      interpret: whether kernels are interpreted, for which any platform will do.

    Raises:
      ValueError: the requested implementation is unknown, not built for the operation, not in this
        JAX, or not for the CPU that is there.
    """
    if requested is not None:
        if requested not in implementations:
            raise ValueError(
                f"{operation}: implementation {requested!r} is not there for these arguments; "
                f"expected one of {', '.join(sorted(implementations))}"
            )
        reason = unavailable(requested)
        if reason is not None:
            raise ValueError(f"{operation}: implementation {requested!r}: {reason}")
        if requested in ("triton", "mosaic") and not interpret and _compat.platform() == "cpu":
            raise ValueError(
                f"{operation}: implementation {requested!r} is for NVIDIA GPUs, this is a CPU. "
                'Leave it out, or ask for "xla"; for tests of the kernel, interpret=True.'
            )
        return implementations[requested](*operands)
    if on_gpu not in implementations:
        return implementations["xla"](*operands)
    reason = unavailable(on_gpu)
    if reason is not None:
        _say_once(operation, reason)
        return implementations["xla"](*operands)
    return jax.lax.platform_dependent(
        *operands, cuda=implementations[on_gpu], default=implementations["xla"]
    )


@functools.cache
def _say_once(operation: str, reason: str) -> None:
    _LOGGER.warning("%s: %s; XLA computes it on GPUs too", operation, reason)

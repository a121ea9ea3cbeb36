"""What a device could compute at most, by the datasheets of the devices that are known."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Dense FLOP/s, without sparsity; the sources are in jspeed's targets (`jspeed targets h200`). The
# SXM boards alone: a device's name tells the PCIe ones, which run at other clocks.
_A100 = {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}
_H100 = {"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 494.7e12}
_B200 = {"bfloat16": 2250e12, "float16": 2250e12, "float32": 1125e12}
_PEAKS: tuple[tuple[str, Mapping[str, float]], ...] = (
    (r"NVIDIA A100-SXM4-(40|80)GB", _A100),
    (r"NVIDIA H100 80GB HBM3", _H100),
    (r"NVIDIA H200", _H100),
    (r"NVIDIA B200", _B200),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of matrix products on one device; None where it is not known.

    Args:
      device_kind: as JAX tells it, `jax.devices()[0].device_kind`.
      dtype: of the operands, in JAX's spelling, at JAX's default precision: float32 runs as TF32.
    """
    for pattern, peaks in _PEAKS:
        if re.fullmatch(pattern, device_kind):
            return peaks.get(dtype)
    return None

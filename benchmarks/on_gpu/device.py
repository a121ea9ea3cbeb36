"""Which device it is, and which versions."""

from __future__ import annotations

import jax

from benchmarks.on_gpu.rows import Clock, Plan, Row
from benchmarks.report import versions

SECTION = "device"


def run(plan: Plan, clock: Clock) -> None:
    """One row: the device's kind, and what it was measured with.

    Raises:
      SystemExit: there is no GPU, and it is no smoke test.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" and not plan.smoke:
        raise SystemExit(f"JAX sees no GPU but {device.device_kind}. Use --cpu-smoke without one.")
    version = device.client.platform_version.splitlines()[0]
    note = f"{versions('jax', 'jaxlib')}, {version}"
    clock.emit(Row(SECTION, device.device_kind, device.platform, note=note))

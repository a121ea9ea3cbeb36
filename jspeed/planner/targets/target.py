"""What a target is: what a device computes, holds, moves and sends, each figure with its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Platform = Literal["cuda", "cpu"]

EFFICIENCIES = ("matmul", "memory", "device_link", "network")
"""The rates of which a program reaches a known share only."""


@dataclass(frozen=True)
class Link:
    """A connection of one device.

    Attributes:
      bandwidth: bytes per second, per device and direction, as on the datasheet.
      latency: seconds for one step, whatever is sent.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class FreshMemory:
    """Memory that the system maps and clears anew each time a program runs, page by page.

    Attributes:
      bandwidth: bytes per second.
      threshold: bytes of the smallest allocation that this happens to.
    """

    bandwidth: float
    threshold: float


@dataclass(frozen=True)
class Target:
    """A device that programs are compiled for and that their time is predicted on.

    Rates are peaks as on the datasheet; `efficiency` says what share of them real programs reach,
    and the methods multiply the two.

    Attributes:
      name: that it is asked for by, `"h200"`.
      description: for people.
      platform: that XLA compiles for.
      compiler: the description of the GPU that XLA compiles by (`GpuTargetConfigProto` as text);
        None for the CPU, which is there.
      memory_bytes: total, as CUDA reports it; of the CPU, what this machine's devices share.
      usable_fraction: of the total, what a program's arrays can take.
      flops: dtype -> peak dense FLOP/s. `"tf32"` is what float32 products of JAX's default
        precision run at on GPUs that have it; `"float32"` what those of precision `HIGHEST` do, and
        all of them elsewhere. `"float8"` stands for all 8-bit floating-point types.
      memory_bandwidth: peak bytes per second, reads and writes counted.
      efficiency: for each of `EFFICIENCIES`, the share of the peak that programs reach.
      launch_seconds: that pass from one kernel to the next beside their own time.
      device_link: to other devices of the same host (NVLink; shared memory on the CPU).
      network: to other hosts.
      host_link: to the memory of the host.
      fresh_memory: what temporaries cost beside their use; None where the runtime keeps its memory,
        as on GPUs.
      sources: figure -> where it is from; `"flops.bfloat16"`, `"network.latency"`, `"compiler"`.
    """

    name: str
    description: str
    platform: Platform
    compiler: str | None
    memory_bytes: int
    usable_fraction: float
    flops: Mapping[str, float]
    memory_bandwidth: float
    efficiency: Mapping[str, float]
    launch_seconds: float
    device_link: Link
    network: Link
    host_link: Link
    sources: Mapping[str, str]
    fresh_memory: FreshMemory | None = None

    @property
    def overlaps_memory(self) -> bool:
        """Whether a kernel loads and stores while it computes: GPUs do, with many threads in
        flight; on one core of a CPU the times add up."""
        return self.platform != "cpu"

    @property
    def limit_bytes(self) -> int:
        """What the arrays of a program can take: the rest of `memory_bytes` is the runtime's."""
        return math.floor(self.memory_bytes * self.usable_fraction)

    def peak_flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products on operands of a dtype, in JAX's spelling, at its default
        precision; `FULL_FLOAT32` for float32 products of precision `HIGHEST`.

        A dtype without a figure of its own (integers, float64) is taken to run like float32.
        """
        if dtype.startswith("float8"):
            dtype = "float8"
        if dtype == "float32" and "tf32" in self.flops:
            dtype = "tf32"
        return self.flops.get(dtype, self.flops["float32"])

    def matmul_flops(self, dtype: str) -> float:
        """FLOP/s that large matrix products reach."""
        return self.peak_flops(dtype) * self.efficiency["matmul"]

    def memory_rate(self) -> float:
        """Bytes per second that elementwise programs reach, reads and writes counted."""
        return self.memory_bandwidth * self.efficiency["memory"]

    def device_link_rate(self) -> float:
        """Bytes per second and direction that collectives reach within a host."""
        return self.device_link.bandwidth * self.efficiency["device_link"]

    def network_rate(self) -> float:
        """Bytes per second and direction that collectives reach between hosts, per device."""
        return self.network.bandwidth * self.efficiency["network"]

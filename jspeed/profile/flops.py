"""FLOPs of a compiled program: every matrix product in it, as often as it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jspeed.profile.costs import is_library_product, product_flops
from jspeed.profile.hlo import Computation, Instruction, Module
from jspeed.profile.trips import Taken, trip_count

_KERNELS = re.compile(r"xla\.gpu\.triton|mosaic_gpu|tpu_custom_call|__cudnn\$|ffi_call")


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution.

    Attributes:
      instruction: that computes it; inside a fusion the product itself.
      flops: of one execution on one device, two per multiplication and addition.
      dtype: of its operands, in JAX's spelling.
      count: executions in one run of the module.
    """

    instruction: Instruction
    flops: float
    dtype: str
    count: int

    @property
    def total(self) -> float:
        """FLOPs of all executions."""
        return self.flops * self.count


def products(module: Module, taken: Taken | None = None) -> list[Product]:
    """The products of one run of a compiled module on one device.

    Args:
      module: parsed.
      taken: how often branches of conditionals run; of a conditional that it does not know the
        branch with the most FLOPs runs.

    Raises:
      JspeedError: how often a loop runs cannot be told.
    """
    return _Walk(module, taken or {}).run(module.entry, 1)


def unknown_kernels(module: Module) -> tuple[str, ...]:
    """Targets of custom calls that may compute products, whose FLOPs are not known here."""
    found: dict[str, None] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions:
            if instruction.opcode != "custom-call" or is_library_product(instruction):
                continue
            target = (instruction.attribute("custom_call_target") or "").strip('"')
            if _KERNELS.search(target) and not product_flops(computation, instruction):
                found.setdefault(target)
    return tuple(found)


class _Walk:
    def __init__(self, module: Module, taken: Taken) -> None:
        self._module, self._taken = module, taken
        self._weights: dict[str, float] = {}

    def run(self, name: str, times: int) -> list[Product]:
        """The products of a computation that runs so often."""
        found: list[Product] = []
        if not times:
            return found
        computation = self._module.computations[name]
        for instruction in computation.instructions:
            for dtype, flops in product_flops(computation, instruction).items():
                found.append(Product(instruction, flops, dtype, times))
            for callee, often in self._called(computation, instruction, times):
                found += self.run(callee, often)
        return found

    def _called(
        self, computation: Computation, instruction: Instruction, times: int
    ) -> Iterator[tuple[str, int]]:
        if instruction.opcode in ("fusion", "fusion-start"):
            callee = (instruction.attribute("calls") or "").lstrip("%")
            if callee in self._module.computations:
                yield callee, times
            return
        called = instruction.called()
        if instruction.opcode == "while":
            times *= trip_count(self._module, computation, instruction)
        elif instruction.name in self._taken:
            yield from zip(called, self._taken[instruction.name], strict=False)
            return
        elif instruction.opcode == "conditional":
            called = (max(called, key=self._weight),)
        for callee in called:
            if callee in self._module.computations:
                yield callee, times

    def _weight(self, name: str) -> float:
        if name not in self._weights:
            self._weights[name] = sum(one.total for one in self.run(name, 1))
        return self._weights[name]

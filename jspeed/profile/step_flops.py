"""The FLOPs of a compiled train step by module of the model, whole, for all devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jspeed.profile.flops import Product, products, unknown_kernels
from jspeed.profile.hlo import Module
from jspeed.profile.owners import Owners, Phase


@dataclass
class ModuleFlops:
    """A module of the model, or a function in which a module computes something itself.

    Attributes:
      name: the last part of its path; of a function its name in brackets.
      path: in the model; empty for the model itself.
      parameters: elements of the parameters in it, whole.
      flops: by phase, of everything in it, on all devices in one step.
      children: in the order of the model.
    """

    name: str
    path: str
    parameters: int = 0
    flops: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    children: list[ModuleFlops] = field(default_factory=list)

    @property
    def total(self) -> float:
        """FLOPs, recomputation included."""
        return sum(self.flops.values())

    def to_json(self) -> dict[str, Any]:
        """Itself and all inside, ready for JSON."""
        return {
            "name": self.name,
            "path": self.path,
            "parameters": self.parameters,
            "flops": {phase.value: flops for phase, flops in self.flops.items()},
            "children": [child.to_json() for child in self.children],
        }


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step of a compiled program on all devices.

    Attributes:
      model: the tree of its modules; its total is the step's.
      dtypes: FLOPs by the dtype of the operands.
      devices: that run the step.
      unknown: kernels that may compute products which are not counted.
    """

    model: ModuleFlops
    dtypes: Mapping[str, float]
    devices: int
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """FLOPs of the step, recomputation included."""
        return self.model.total

    @property
    def of_model(self) -> float:
        """FLOPs of the model alone, forward and backward: without what is computed again, and
        without the optimizer's."""
        return self.model.flops[Phase.FORWARD] + self.model.flops[Phase.BACKWARD]

    @property
    def recomputed(self) -> float:
        """FLOPs of what the backward pass computes again."""
        return self.model.flops[Phase.RECOMPUTED]


@dataclass(frozen=True)
class Part:
    """Devices that run the same branches of a program.

    Attributes:
      products: of one device.
      devices: that are alike.
    """

    products: Sequence[Product]
    devices: int


def step_flops(
    module: Module,
    owners: Owners,
    parameters: Mapping[str, int],
    *,
    name: str,
    parts: Sequence[Part],
) -> StepFlops:
    """Puts the products of a step into the tree of the model's modules.

    Args:
      module: the compiled one, parsed.
      owners: of its instructions.
      parameters: path -> elements.
      name: of the model.
      parts: what the devices run; see `even_parts`.
    """
    root = ModuleFlops(name, "")
    nodes = {"": root}
    for path in owners.paths:
        parent, _, last = path.rpartition("/")
        nodes[path] = ModuleFlops(last, path)
        nodes[parent].children.append(nodes[path])
    for path, elements in parameters.items():
        for node in _line(nodes, path.rpartition("/")[0]):
            node.parameters += elements
    functions: dict[tuple[str, str], ModuleFlops] = {}
    dtypes: dict[str, float] = {}
    for part in parts:
        for product in part.products:
            owner, flops = owners.of(product.instruction), product.total * part.devices
            dtypes[product.dtype] = dtypes.get(product.dtype, 0.0) + flops
            line = _line(nodes, owner.path)
            if line[-1].children:  # beside the modules in it
                key = (owner.path, owner.function)
                if key not in functions:
                    functions[key] = ModuleFlops(f"({owner.function or 'elsewhere'})", owner.path)
                line.append(functions[key])
            for node in line:
                node.flops[owner.phase] += flops
    for (path, _), node in functions.items():
        nodes[path].children.append(node)
    devices = sum(part.devices for part in parts)
    return StepFlops(root, dtypes, devices, unknown_kernels(module))


def even_parts(module: Module, devices: int) -> tuple[Part, ...]:
    """The parts of a program that is the same on every device."""
    return (Part(products(module), devices),)


def parameter_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Path -> elements."""
    return {path: math.prod(shape) for path, shape in shapes.items()}


def _line(nodes: Mapping[str, ModuleFlops], path: str) -> list[ModuleFlops]:
    """From the root to the node of a path, both included."""
    parts = path.split("/") if path else []
    return [nodes["/".join(parts[:end])] for end in range(len(parts) + 1)]

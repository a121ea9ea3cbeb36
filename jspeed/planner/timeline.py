"""How long a compiled step takes: the schedule walked with a roofline of compute, memory and
network (Williams et al., 2009).

Kernels run one after another, each as long as the slower of its FLOPs and its bytes, on a CPU's
core as long as both. An
asynchronous collective starts where the schedule starts it, waits for the one before it on the same
axes, and costs only what is left when the schedule asks for its result; so overlap counts exactly
as far as the compiler put compute between start and end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from jspeed.nn.attention import STAND_IN
from jspeed.planner.cluster import Cluster, GroupLink, collective_seconds
from jspeed.planner.collectives import Carried, carried_by, collective_axes
from jspeed.planner.costs import FREE, Cost, Costs
from jspeed.planner.hlo import Computation, Instruction, Module
from jspeed.planner.trips import trip_count

COMPUTE, MEMORY, LAUNCH = "compute", "memory", "launch"
ALLOCATION = "allocation"


@dataclass
class Spent:
    """Where time goes; seconds.

    Attributes:
      seconds: from start to end.
      parts: of it, by what bounds it: `compute` (kernels that wait for FLOPs), `memory` (kernels
        that wait for bytes), `launch` (between kernels), `network:<axes>` (waiting for a
        collective), `allocation` (memory that the system gives anew).
      network: that collectives are on their way, waited for or not, by axes.
      flops: of matrix products, by dtype.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    network: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: Spent, times: int = 1) -> None:
        """Adds what happens `times` in a row."""
        self.seconds += times * other.seconds
        for mine, theirs in (
            (self.parts, other.parts),
            (self.network, other.network),
            (self.flops, other.flops),
        ):
            for key, value in theirs.items():
                mine[key] += times * value

    def spend(self, part: str, seconds: float) -> None:
        if seconds > 0:
            self.seconds += seconds
            self.parts[part] += seconds

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def bound(self) -> str:
        """The part that takes the most."""
        return max(self.parts, key=lambda part: self.parts[part]) if self.parts else COMPUTE


def time_step(
    module: Module, cluster: Cluster, sizes: Mapping[str, int], *, temporaries: int = 0
) -> Spent:
    """The time of one run of a compiled module on a cluster.

    Args:
      module: parsed.
      cluster: whose rates count.
      sizes: of the mesh axes, in the mesh's order.
      temporaries: bytes that the run allocates on one device, in one piece.

    Raises:
      JspeedError: how often a loop runs cannot be told.
    """
    spent = _Walk(module, cluster, sizes).run(module.entry)
    fresh = cluster.target.fresh_memory
    if fresh is not None and temporaries >= fresh.threshold:
        spent.spend(ALLOCATION, temporaries / fresh.bandwidth)
    return spent


class _Walk:
    def __init__(self, module: Module, cluster: Cluster, sizes: Mapping[str, int]) -> None:
        self.module, self.cluster, self.sizes = module, cluster, sizes
        self.costs = Costs(module)
        self._known: dict[str, Spent] = {}
        self._links: dict[tuple[str, ...], GroupLink] = {}

    def run(self, name: str) -> Spent:
        """What one run of a computation takes."""
        if name not in self._known:
            self._known[name] = self._run(self.module.computations[name])
        return self._known[name]

    def _run(self, computation: Computation) -> Spent:
        spent = Spent()
        free_at: dict[str, float] = defaultdict(float)  # of the network of each set of axes
        ends: dict[str, tuple[str, float]] = {}
        for instruction in computation.instructions:
            carried = carried_by(self.module, computation, instruction)
            waited = [ends[name] for name in instruction.operands if name in ends]
            if carried is not None:
                axes, seconds = self._collective(carried)
                if not axes:  # every device is on its own
                    continue
                spent.network[axes] += seconds
                if carried.asynchronous:
                    begin = max(spent.seconds, free_at[axes])
                    free_at[axes] = begin + seconds
                    ends[instruction.name] = (axes, begin + seconds)
                else:
                    spent.spend(f"network:{axes}", seconds)
            elif waited and instruction.opcode.endswith("-done"):
                for axes, end in waited:
                    if end > spent.seconds:
                        spent.spend(f"network:{axes}", end - spent.seconds)
            elif waited:  # an async-update hands the collective on
                ends[instruction.name] = waited[0]
            else:
                spent.add(self._instruction(computation, instruction))
        return spent

    def _collective(self, carried: Carried) -> tuple[str, float]:
        axes = collective_axes(carried.instruction, self.sizes)
        if axes not in self._links:
            self._links[axes] = self.cluster.link(axes, self.sizes)
        seconds = collective_seconds(carried.kind, carried.bytes, self._links[axes])
        return "+".join(axes), seconds

    def _instruction(self, computation: Computation, instruction: Instruction) -> Spent:
        opcode = instruction.opcode
        spent = Spent()
        if opcode == "while":
            if STAND_IN in instruction.op_name:
                return self._fused_loop(computation, instruction)
            turns = trip_count(self.module, computation, instruction)
            for body in instruction.called():
                spent.add(self.run(body), turns)
        elif opcode == "conditional":
            branches = [self.run(name) for name in instruction.called()]
            spent.add(max(branches, key=lambda branch: branch.seconds))
        elif opcode in ("call", "async-start"):
            for callee in instruction.called():
                spent.add(self.run(callee))
        elif opcode not in FREE and not opcode.endswith(("-done", "-update")):
            self._kernel(spent, self.costs.of(computation, instruction))
        return spent

    def _fused_loop(self, computation: Computation, loop: Instruction) -> Spent:
        """A loop that a GPU runs as one kernel: what it carries is read or written once."""
        turns = trip_count(self.module, computation, loop)
        flops: dict[str, float] = defaultdict(float)
        for body in loop.called():
            for dtype, count in self.run(body).flops.items():
                flops[dtype] += turns * count
        spent = Spent()
        self._kernel(spent, Cost(flops, sum(array.bytes for array in loop.arrays())))
        return spent

    def _kernel(self, spent: Spent, cost: Cost) -> None:
        if not cost.flops and not cost.bytes:
            return
        target = self.cluster.target
        compute = sum(count / target.matmul_flops(dtype) for dtype, count in cost.flops.items())
        memory = cost.bytes / target.memory_rate()
        if target.overlaps_memory:
            spent.spend(COMPUTE if compute >= memory else MEMORY, max(compute, memory))
        else:
            spent.spend(COMPUTE, compute)
            spent.spend(MEMORY, memory)
        spent.spend(LAUNCH, target.launch_seconds)
        for dtype, count in cost.flops.items():
            spent.flops[dtype] += count

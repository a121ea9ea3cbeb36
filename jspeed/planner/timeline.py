"""How long a compiled step takes: the schedule walked with a roofline of compute, memory and
network (Williams et al., 2009).

Kernels run one after another, each as long as the slower of its FLOPs and its bytes, on a CPU's
core as long as both. An
asynchronous collective starts where the schedule starts it, waits for the one before it on the same
axes, and costs only what is left when the schedule asks for its result; so overlap counts exactly
as far as the compiler put compute between start and end.

The stages of a pipeline are walked side by side, turn by turn, each through the branches that it
runs. They meet at every permute over `pipe`: one starts when both of its ends have come to it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jspeed.layout.mesh import PIPE
from jspeed.nn.attention import STAND_IN
from jspeed.planner.cluster import Cluster, GroupLink, collective_seconds
from jspeed.profile.collectives import Carried, carried_by, collective_axes, collective_pairs
from jspeed.profile.costs import FREE, Cost, Costs
from jspeed.profile.hlo import Computation, Instruction, Module
from jspeed.profile.trips import trip_count
from jspeed.profile.turns import TurnLoop, Way

COMPUTE, MEMORY, LAUNCH = "compute", "memory", "launch"
ALLOCATION = "allocation"
BUBBLE = "bubble"


@dataclass
class Spent:
    """Where time goes; seconds.

    Attributes:
      seconds: from start to end.
      parts: of it, by what bounds it: `compute` (kernels that wait for FLOPs), `memory` (kernels
        that wait for bytes), `launch` (between kernels), `network:<axes>` (waiting for a
        collective), `allocation` (memory that the system gives anew), `bubble` (waiting for another
        stage of the pipeline).
      network: that collectives are on their way, waited for or not, by axes.
      flops: of matrix products, by dtype.
      stage: of the pipeline, whose time this is.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    network: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stage: int = 0

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
    module: Module,
    cluster: Cluster,
    sizes: Mapping[str, int],
    *,
    temporaries: int = 0,
    pipeline: TurnLoop | None = None,
) -> Spent:
    """The time of one run of a compiled module on a cluster.

    Args:
      module: parsed.
      cluster: whose rates count.
      sizes: of the mesh axes, in the mesh's order.
      temporaries: bytes that the run allocates on one device, in one piece.
      pipeline: what the stages do in the loop over turns, if there is one.

    Returns:
      Where the time goes; in a pipeline that of the stage that works longest.

    Raises:
      JspeedError: how often a loop runs cannot be told.
    """
    walk = _Walk(module, cluster, sizes, pipeline)
    spent = walk.run(module.entry)
    fresh = cluster.target.fresh_memory
    if fresh is not None and temporaries >= fresh.threshold:
        spent.spend(ALLOCATION, temporaries / fresh.bandwidth)
    spent.stage = walk.busiest
    return spent


@dataclass
class _Clock:
    """One device on its way through a computation.

    Attributes:
      spent: so far.
      free_at: when the network of each set of axes is free again.
      ends: of the collectives on their way: axes, when it started, when it ends.
    """

    spent: Spent = field(default_factory=Spent)
    free_at: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ends: dict[str, tuple[str, float, float]] = field(default_factory=dict)

    def start(self, name: str, axes: str, seconds: float, *, ready: float = 0.0) -> None:
        """An asynchronous collective, for which the others are ready at some time."""
        begin = max(self.spent.seconds, self.free_at[axes], ready)
        self.free_at[axes] = begin + seconds
        self.ends[name] = (axes, begin, begin + seconds)

    def finish(self, name: str) -> None:
        """Waits for a collective: for the others to come to it, then for what it carries."""
        axes, begin, end = self.ends[name]
        if PIPE in axes.split("+"):
            self.spent.spend(BUBBLE, min(begin, end) - self.spent.seconds)
        self.spent.spend(f"network:{axes}", end - self.spent.seconds)


class _Walk:
    def __init__(
        self,
        module: Module,
        cluster: Cluster,
        sizes: Mapping[str, int],
        pipeline: TurnLoop | None,
    ) -> None:
        self.module, self.cluster, self.sizes = module, cluster, sizes
        self.pipeline = pipeline
        self.busiest = 0
        self.costs = Costs(module)
        self._known: dict[tuple[str, Way], Spent] = {}
        self._links: dict[tuple[str, ...], GroupLink] = {}

    def run(self, name: str, way: Way = ()) -> Spent:
        """What one run of a computation takes, through the branches that are known."""
        key = (name, way)
        if key not in self._known:
            self._known[key] = self._run(self.module.computations[name], way)
        return self._known[key]

    def _run(self, computation: Computation, way: Way) -> Spent:
        clock, ways = _Clock(), _by_name(way)
        for instruction in computation.instructions:
            carried = carried_by(self.module, computation, instruction)
            if carried is not None:
                axes, seconds = self._collective(carried)
                if not axes:  # every device is on its own
                    continue
                clock.spent.network[axes] += seconds
                clock.start(instruction.name, axes, seconds)
                if not carried.asynchronous:
                    clock.finish(instruction.name)
                    del clock.ends[instruction.name]
            elif not _waits(clock, instruction):
                clock.spent.add(self._instruction(computation, instruction, ways))
        return clock.spent

    def _turns(self, loop: TurnLoop, body: Computation) -> Spent:
        """The loop over turns of a pipeline, for the stage that works longest."""
        clocks = [_Clock() for _ in range(self.sizes[PIPE])]
        steps = [(one, carried_by(self.module, body, one)) for one in body.instructions]
        for turn in loop.ways:
            ways = [_by_name(way) for way in turn]
            for clock in clocks:
                clock.ends.clear()
            for instruction, carried in steps:
                if carried is not None:
                    self._meet(clocks, instruction, carried)
                    continue
                for clock, known in zip(clocks, ways, strict=True):
                    if not _waits(clock, instruction):
                        clock.spent.add(self._instruction(body, instruction, known))
        end = max(clock.spent.seconds for clock in clocks)
        works = [clock.spent.seconds - clock.spent.parts[BUBBLE] for clock in clocks]
        self.busiest = works.index(max(works))
        spent = clocks[self.busiest].spent
        spent.spend(BUBBLE, end - spent.seconds)
        return spent

    def _meet(self, clocks: Sequence[_Clock], instruction: Instruction, carried: Carried) -> None:
        """A collective of the loop over turns."""
        axes, seconds = self._collective(carried)
        if not axes:
            return
        now = [clock.spent.seconds for clock in clocks]
        for stage, clock in enumerate(clocks):
            others = self._partners(carried.instruction, stage) if PIPE in axes else {stage}
            clock.spent.network[axes] += seconds
            ready = max(now[other] for other in others)
            clock.start(instruction.name, axes, seconds, ready=ready)
            if not carried.asynchronous:
                clock.finish(instruction.name)
                del clock.ends[instruction.name]

    def _partners(self, instruction: Instruction, stage: int) -> set[int]:
        """The stages that a stage exchanges with; all of them unless it is a permute."""
        pairs = collective_pairs(instruction)
        if pairs is None:
            return set(range(self.sizes[PIPE]))
        each = math.prod(self.sizes.values()) // self.sizes[PIPE]
        stages = [(source // each, target // each) for source, target in pairs]
        return {stage, *(other for pair in stages if stage in pair for other in pair)}

    def _collective(self, carried: Carried) -> tuple[str, float]:
        axes = collective_axes(carried.instruction, self.sizes)
        if axes not in self._links:
            self._links[axes] = self.cluster.link(axes, self.sizes)
        seconds = collective_seconds(carried.kind, carried.bytes, self._links[axes])
        return "+".join(axes), seconds

    def _instruction(
        self, computation: Computation, instruction: Instruction, ways: _Ways
    ) -> Spent:
        opcode, name = instruction.opcode, instruction.name
        spent = Spent()
        if opcode == "while":
            if STAND_IN in instruction.op_name:
                return self._fused_loop(computation, instruction)
            (body,) = instruction.called()
            if self.pipeline is not None and name == self.pipeline.name:
                return self._turns(self.pipeline, self.module.computations[body])
            if name in ways:
                for way in ways[name][1]:
                    spent.add(self.run(body, way))
            else:
                spent.add(self.run(body), trip_count(self.module, computation, instruction))
        elif opcode == "conditional":
            if name in ways:
                branch, (way,) = ways[name]
                return self.run(instruction.called()[branch], way)
            branches = [self.run(callee) for callee in instruction.called()]
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


_Ways = Mapping[str, tuple[int, tuple[Way, ...]]]


def _by_name(way: Way) -> _Ways:
    return {name: (branch, inner) for name, branch, inner in way}


def _waits(clock: _Clock, instruction: Instruction) -> bool:
    """Whether an instruction is about a collective on its way; one that ends it is waited for."""
    waited = [name for name in instruction.operands if name in clock.ends]
    if waited and instruction.opcode.endswith("-done"):
        for name in waited:
            clock.finish(name)
    elif waited:  # an async-update hands the collective on
        clock.ends[instruction.name] = clock.ends[waited[0]]
    return bool(waited)

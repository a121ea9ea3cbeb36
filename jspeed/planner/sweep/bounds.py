"""What a layout needs at the very least, from shapes alone: nothing that fits or wins is ruled out.

Each figure counts only what the step cannot do without, so that the compiled figure is larger.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np

from jspeed.config import AttentionConfig, Config
from jspeed.engine.abstract_run import abstract_facts, model_factory
from jspeed.engine.build import mesh_shape, plan_run
from jspeed.engine.state_explanation import explain_plan
from jspeed.layout.explain import Explanation
from jspeed.layout.mesh import BATCH_AXES, PIPE, ZERO_AXES, make_abstract_mesh
from jspeed.layout.rules import axes_of
from jspeed.layout.stages import StageOrder
from jspeed.layout.zero import Role
from jspeed.models import ModelFactory
from jspeed.pipeline.cost import live_microbatches
from jspeed.pipeline.schedules import ZERO_BUBBLE, make_schedule
from jspeed.planner.cluster import Cluster, collective_seconds
from jspeed.planner.sweep.candidates import Candidate
from jspeed.planner.sweep.sizes import sequence_length
from jspeed.training.program import Program, make_program

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Floor:
    """What a candidate needs at the very least, on one device; of pipeline stages on the one that
    needs most.

    Attributes:
      state_bytes: of the training state, exact.
      accumulator_bytes: of the gradients that a loop over microbatches carries.
      activation_bytes: what the forward pass keeps of each layer: one array of the residual width.
      compute_seconds: of the step's matrix products at the rate of the target; in a pipeline with
        the way of a microbatch to the last stage and back.
      network_seconds: of the collectives that ZeRO cannot do without.
    """

    state_bytes: int
    accumulator_bytes: int
    activation_bytes: int
    compute_seconds: float
    network_seconds: float

    @property
    def peak_bytes(self) -> int:
        """During the backward pass all three are there."""
        return self.state_bytes + self.accumulator_bytes + self.activation_bytes

    @property
    def step_seconds(self) -> float:
        """Computing and communicating may overlap."""
        return max(self.compute_seconds, self.network_seconds)


class Bounds:
    """Floors of the candidates of one run on one cluster.

    Args:
      config: of the run; candidates differ from it in what `Candidate.changes` names.
      cluster: to run on.

    Raises:
      ConfigError: nothing tells the size of the model's vocabulary.
    """

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self._cluster = cluster
        self._factory = _factory(config)
        self._laid_out: dict[tuple[int, ...], _LaidOut] = {}

    def floor(self, candidate: Candidate, config: Config) -> Floor:
        """What a candidate needs at the very least.

        Args:
          candidate: the layout.
          config: of it.

        Raises:
          ConfigError, LayoutError, ModelError: it cannot be laid out.
        """
        laid_out = self._lay_out(candidate, config)
        state = laid_out.state
        return Floor(
            state_bytes=state.total_bytes + sum(state.other_bytes.values()),
            accumulator_bytes=_accumulator_bytes(candidate, config, state),
            activation_bytes=_activation_bytes(candidate, config, laid_out),
            compute_seconds=self._compute_seconds(candidate, config, laid_out),
            network_seconds=self._network_seconds(candidate, config, state),
        )

    def _lay_out(self, candidate: Candidate, config: Config) -> _LaidOut:
        """The state's layout, which neither microbatch nor remat moves."""
        key = (*candidate.mesh.sizes(), candidate.stage, candidate.chunks)
        if key not in self._laid_out:
            mesh = make_abstract_mesh(mesh_shape(config, self._cluster.gpus))
            config = config.resolve_auto(abstract_facts(config, []))
            run = plan_run(config, self._program, mesh)
            self._laid_out[key] = _LaidOut(explain_plan(self._program, run), run.layout.order)
        return self._laid_out[key]

    @functools.cached_property
    def _program(self) -> Program:
        return make_program(self._factory)

    def _compute_seconds(self, candidate: Candidate, config: Config, laid_out: _LaidOut) -> float:
        """Causal attention is counted so; what remat computes again, without attention and without
        the last product of each layer, whose result nothing needs. Forward alone where something is
        frozen: a bound must not be too high."""
        model, length = self._factory, sequence_length(config)
        shape = model.config
        products = model.product_flops_per_token()
        head = 6.0 * shape.hidden_size * shape.vocab_size
        attention = model.flops_per_token(length) - products
        halved = model.causal and shape.pattern is None  # a pattern's share is that of the triangle
        layers = products + attention / (2 if halved else 1) - head
        forward = layers / 3
        if candidate.remat == "full":
            last = 2.0 * shape.layers * shape.hidden_size * shape.intermediate_size
            layers += (products - head) / 3 - last
        if config.trainable is not None:  # what is frozen may have no backward pass at all
            layers, head = forward, head / 3
        flops = _longest_stage(
            candidate,
            laid_out.order,
            layers=shape.layers,
            layer=_Layer(forward / shape.layers, layers / shape.layers),
            head=head,
        )
        tokens = candidate.micro_batch_size * candidate.accumulation * length
        rate = self._cluster.target.matmul_flops(config.precision.compute_dtype)
        return flops * tokens / (candidate.tensor * candidate.seq) / rate

    def _network_seconds(self, candidate: Candidate, config: Config, state: Explanation) -> float:
        """Stage 0: an all-reduce of the gradients a step. 1: a reduce-scatter and an all-gather a
        step. 2: the reduce-scatter a microbatch. 3: both a microbatch. What is frozen has none of
        it before stage 3; nothing is counted then."""
        if config.trainable is not None:
            return 0.0
        precision = config.precision
        wire = _SIZES[precision.communication_dtype or precision.compute_dtype]
        copies = _SIZES[precision.compute_dtype]
        split, whole = _elements(state)
        turns = candidate.accumulation
        # What only some stages use, as the head, is left out of what is sent every microbatch.
        of_stages, _ = _elements(state, in_stages=candidate.pipe > 1)

        def seconds(kind: str, elements: int, size: int, axes: tuple[str, ...]) -> float:
            link = self._cluster.link(axes, state.sizes)
            # Without latency, which overlapping collectives may hide from one another.
            link = dataclasses.replace(link, latency=0.0)
            return collective_seconds(kind, elements * size, link) if elements else 0.0

        if candidate.stage == 0:
            return seconds("all-reduce", split + whole, wire, BATCH_AXES)
        scatter = seconds("reduce-scatter", split, wire, ZERO_AXES)
        gather = seconds("all-gather", split, copies, ZERO_AXES)
        if candidate.stage == 1:
            return gather + scatter
        scatter = seconds("reduce-scatter", of_stages, wire, ZERO_AXES)
        if candidate.stage == 2:
            return gather + turns * scatter
        return turns * (scatter + seconds("all-gather", of_stages, copies, ZERO_AXES))


@dataclass(frozen=True)
class _Layer:
    """FLOPs per token of one layer: of its forward pass, and of both with what remat repeats."""

    forward: float
    whole: float


@dataclass(frozen=True)
class _LaidOut:
    """A candidate's training state, and the layers of its stages."""

    state: Explanation
    order: StageOrder | None


def _longest_stage(
    candidate: Candidate, order: StageOrder | None, *, layers: int, layer: _Layer, head: float
) -> float:
    """What the longest stage computes in a step, in FLOPs per token that a device handles.

    The last stage has the head too, and stands still while the first microbatch is on its way to
    it and, unless weights are left to fill that time, while the last one is on its way back.

    Args:
      candidate: the layout.
      order: the layers of the stages; None without a pipeline.
      layers: of the model.
      layer: FLOPs per token of one of them.
      head: FLOPs per token of the head.
    """
    if order is None:
        return layers * layer.whole + head
    stages = candidate.pipe
    counts = [sum(order.counts[stage::stages]) for stage in range(stages)]
    before = sum(order.counts[: stages - 1])
    way = before * (layer.forward if candidate.schedule == ZERO_BUBBLE else layer.whole)
    last = counts[-1] * layer.whole + head + way / candidate.accumulation
    return max(max(counts) * layer.whole, last)


def _factory(config: Config) -> ModelFactory:
    # Which attention computes moves no array, and the named one may need a device.
    assert config.model is not None
    model = dataclasses.replace(config.model, attention=AttentionConfig("xla"))
    config = dataclasses.replace(config, model=model)
    return model_factory(config, platform="cpu", remarks=[])


def _elements(state: Explanation, *, in_stages: bool = False) -> tuple[int, int]:
    """Elements of a device's part of the model that ZeRO splits over data, and of all others; with
    `in_stages` only of what is split over pipeline stages."""
    split = whole = 0
    for leaf in state.leaves:
        elements = leaf.elements
        axes = [axis for entry in leaf.home.spec for axis in axes_of(entry)]
        if in_stages and PIPE not in axes:
            continue
        elements //= math.prod(state.sizes[axis] for axis in axes if axis not in ZERO_AXES)
        if any(axis in ZERO_AXES for axis in axes):
            split += elements
        else:
            whole += elements
    return split, whole


def _accumulator_bytes(candidate: Candidate, config: Config, state: Explanation) -> int:
    """One microbatch needs no accumulator."""
    if candidate.accumulation == 1:
        return 0
    size = _SIZES[config.precision.grad_accum_dtype]
    if candidate.stage <= 1:
        return size * sum(_elements(state))
    fp32 = np.dtype(np.float32).itemsize
    return sum(leaf.shares[Role.MASTER].bytes_per_device // fp32 * size for leaf in state.leaves)


def _activation_bytes(candidate: Candidate, config: Config, laid_out: _LaidOut) -> int:
    """With remat each layer's input is kept, and without it more; over `tensor` it may be split,
    and over `seq` it is. In a pipeline a stage keeps those of its own layers, of as many
    microbatches as its schedule has live."""
    model, order = config.model, laid_out.order
    assert model is not None
    size = _SIZES[config.precision.compute_dtype]
    rows = candidate.micro_batch_size * sequence_length(config)
    kept = model.layers
    if order is not None:
        live = _most_live(
            candidate.schedule, candidate.pipe, candidate.accumulation, candidate.chunks
        )
        kept = order.rows_per_chunk * live
    return kept * rows * model.hidden_size * size // (candidate.tensor * candidate.seq)


@functools.lru_cache(maxsize=1024)
def _most_live(kind: str, stages: int, microbatches: int, chunks: int) -> int:
    """The chunks of microbatches that a stage keeps at the peak."""
    schedule = make_schedule(kind, stages=stages, microbatches=microbatches, chunks=chunks)
    return int(live_microbatches(schedule).max())

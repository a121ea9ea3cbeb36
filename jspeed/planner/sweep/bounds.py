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
from jspeed.layout.mesh import BATCH_AXES, ZERO_AXES, make_abstract_mesh
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Role
from jspeed.models import ModelFactory
from jspeed.planner.cluster import Cluster, collective_seconds
from jspeed.planner.sweep.candidates import Candidate
from jspeed.training.program import Program, make_program

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Floor:
    """What a candidate needs at the very least, on one device.

    Attributes:
      state_bytes: of the training state, exact.
      accumulator_bytes: of the gradients that a loop over microbatches carries.
      activation_bytes: what the forward pass keeps of each layer: one array of the residual width.
      compute_seconds: of the step's matrix products at the rate of the target.
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
        self._explained: dict[tuple[int, ...], Explanation] = {}

    def floor(self, candidate: Candidate, config: Config) -> Floor:
        """What a candidate needs at the very least.

        Args:
          candidate: the layout.
          config: of it.

        Raises:
          ConfigError, LayoutError, ModelError: it cannot be laid out.
        """
        state = self._explain(candidate, config)
        return Floor(
            state_bytes=state.total_bytes + sum(state.other_bytes.values()),
            accumulator_bytes=_accumulator_bytes(candidate, config, state),
            activation_bytes=_activation_bytes(candidate, config),
            compute_seconds=self._compute_seconds(candidate, config),
            network_seconds=self._network_seconds(candidate, config, state),
        )

    def _explain(self, candidate: Candidate, config: Config) -> Explanation:
        """The state's layout, which neither microbatch nor remat moves."""
        key = (candidate.replica, candidate.data, candidate.tensor, candidate.stage)
        if key not in self._explained:
            mesh = make_abstract_mesh(mesh_shape(config, self._cluster.gpus))
            config = config.resolve_auto(abstract_facts(config, []))
            self._explained[key] = explain_plan(
                self._program, plan_run(config, self._program, mesh)
            )
        return self._explained[key]

    @functools.cached_property
    def _program(self) -> Program:
        return make_program(self._factory)

    def _compute_seconds(self, candidate: Candidate, config: Config) -> float:
        """Attention is counted causal, and what remat computes again without attention and without
        the last product of each layer, whose result nothing needs."""
        model, length = self._factory, sequence_length(config)
        products = model.flops_per_token(0)
        attention = (model.flops_per_token(length) - products) / 2
        flops = products + attention
        if candidate.remat == "full":
            shape = model.config
            head = 6.0 * shape.hidden_size * shape.vocab_size
            last = 2.0 * shape.layers * shape.hidden_size * shape.intermediate_size
            flops += (products - head) / 3 - last
        rows = candidate.micro_batch_size * candidate.accumulation
        rate = self._cluster.target.matmul_flops(config.precision.compute_dtype)
        return flops * rows * length / (candidate.tensor * config.mesh.seq) / rate

    def _network_seconds(self, candidate: Candidate, config: Config, state: Explanation) -> float:
        """Stage 0: an all-reduce of the gradients a step. 1: a reduce-scatter and an all-gather a
        step. 2: the reduce-scatter a microbatch. 3: both a microbatch."""
        precision = config.precision
        wire = _SIZES[precision.communication_dtype or precision.compute_dtype]
        copies = _SIZES[precision.compute_dtype]
        split, whole = _elements(state)
        turns = candidate.accumulation

        def seconds(kind: str, elements: int, size: int, axes: tuple[str, ...]) -> float:
            link = self._cluster.link(axes, state.sizes)
            # Without latency, which overlapping collectives may hide from one another.
            link = dataclasses.replace(link, latency=0.0)
            return collective_seconds(kind, elements * size, link) if elements else 0.0

        if candidate.stage == 0:
            return seconds("all-reduce", split + whole, wire, BATCH_AXES)
        scatter = seconds("reduce-scatter", split, wire, ZERO_AXES)
        gather = seconds("all-gather", split, copies, ZERO_AXES)
        if candidate.stage == 3:
            return turns * (scatter + gather)
        return gather + scatter * (turns if candidate.stage == 2 else 1)


def sequence_length(config: Config) -> int:
    """Tokens of a row."""
    model, data = config.model, config.data
    assert model is not None
    return data.sequence_length if data else model.sequence_length


def _factory(config: Config) -> ModelFactory:
    # Which attention computes moves no array, and the named one may need a device.
    assert config.model is not None
    model = dataclasses.replace(config.model, attention=AttentionConfig("xla"))
    config = dataclasses.replace(config, model=model)
    return model_factory(config, platform="cpu", remarks=[])


def _elements(state: Explanation) -> tuple[int, int]:
    """Elements of a device's tensor shard that ZeRO splits over data, and of all others."""
    split = whole = 0
    for leaf in state.leaves:
        elements = leaf.elements
        axes = [axis for entry in leaf.home.spec for axis in axes_of(entry)]
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


def _activation_bytes(candidate: Candidate, config: Config) -> int:
    """With remat each layer's input is kept, and without it more; over `tensor` it may be split,
    and over `seq` it is."""
    model = config.model
    assert model is not None
    size = _SIZES[config.precision.compute_dtype]
    rows = candidate.micro_batch_size * sequence_length(config)
    split = candidate.tensor * config.mesh.seq
    return model.layers * rows * model.hidden_size * size // split

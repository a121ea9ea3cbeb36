"""A plan: the real train step of a run file, compiled for a cluster that need not be there, and
what it says of memory, communication and time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from jspeed.config import Config
from jspeed.core.errors import ConfigError
from jspeed.engine.abstract_run import (
    abstract_facts,
    for_devices,
    idle_axes,
    model_factory,
    token_batch,
)
from jspeed.engine.build import RunPlan, mesh_shape, plan_run
from jspeed.engine.compilation import jit_step
from jspeed.engine.state_explanation import explain_plan
from jspeed.layout.explain import Explanation, Share
from jspeed.layout.mesh import ZERO_AXES
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Role
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from jspeed.nn.attention import STAND_IN
from jspeed.planner.cluster import Cluster
from jspeed.planner.collectives import Collective
from jspeed.planner.compiled import Compiled, compile_lowered
from jspeed.planner.memory import Memory, account
from jspeed.planner.origins import Origins, module_classes
from jspeed.planner.timeline import Spent, time_step
from jspeed.planner.volume import Volume, volume
from jspeed.training.program import Program, make_program
from jspeed.training.state import abstract_state

_STACK = 100
Traffic = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a run needs and takes on a cluster; bytes and FLOPs are those of one device.

    Attributes:
      cluster: that it was compiled for.
      family: of the model.
      state: where the training state lives.
      run: layout, batch sizes and optimizer.
      tokens: per step, of the global batch.
      memory: by role.
      traffic: one entry per kind, axes and dtype of collectives, largest first.
      volume: beside the ZeRO paper's.
      time: where it goes.
      model_flops: of one step without recomputation, on one device.
      remarks: what was assumed.
    """

    cluster: Cluster
    family: str
    state: Explanation
    run: RunPlan
    tokens: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    volume: Volume
    time: Spent
    model_flops: float
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.headroom >= 0

    @property
    def flops(self) -> float:
        """Of all matrix products that the compiled step runs, recomputation included."""
        return self.time.total_flops

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.tokens / self.time.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (PaLM, appendix B): the model's FLOPs against the peak's."""
        peak = self.cluster.target.peak_flops(self.run.layout.compute_dtype)
        return self.model_flops / (peak * self.time.seconds)

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        layout, batch, time = self.run.layout, self.run.batch, self.time
        return {
            "target": self.cluster.target.name,
            "gpus": self.cluster.gpus,
            "gpus_per_host": self.cluster.per_host,
            "model": {"family": self.family, "parameters": self.state.parameters},
            "mesh": dict(layout.sizes),
            "zero_stage": layout.stage,
            "compute_dtype": layout.compute_dtype,
            "train_batch_size": batch.train_batch_size,
            "micro_batch_size": batch.micro_batch_size,
            "gradient_accumulation_steps": batch.accumulation,
            "fits": self.fits,
            "memory": self.memory.to_json(),
            "collectives": [dict(entry) for entry in self.traffic],
            "volume": self.volume.to_json(),
            "flops": self.flops,
            "model_flops": self.model_flops,
            "step_seconds": time.seconds,
            "time": {
                "parts": dict(time.parts),
                "network_busy": dict(time.network),
            },
            "tokens_per_step": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "bound": time.bound,
            "kept_whole": kept_whole(self.state),
            "suggestions": [],
            "remarks": list(self.remarks),
        }


def kept_whole(state: Explanation) -> list[dict[str, str]]:
    """The parameters that every device holds whole although the ZeRO stage splits, with the reason;
    also those for which the layout gives none, judged by where their arrays live."""
    splits = state.stage > 0 and math.prod(state.sizes[axis] for axis in ZERO_AXES) > 1
    roles = {Role.MOMENTS}
    if state.stage == 3 or state.compute_dtype != "float32":  # in fp32 the master is the parameter
        roles.add(Role.MASTER)
    found = []
    for leaf in state.leaves:
        shares = [leaf.shares[role] for role in roles if role in leaf.shares]
        because = leaf.whole_because
        if not because and splits and not all(map(_over_zero_axes, shares)):
            because = f"no reason is known; stage {state.stage} was to split it"
        if because:
            found.append({"path": leaf.path, "because": because})
    return found


def _over_zero_axes(share: Share) -> bool:
    return any(axis in ZERO_AXES for entry in share.spec for axis in axes_of(entry))


def make_plan(config: Config, cluster: Cluster) -> Plan:
    """Compiles the train step of a run file for a cluster.

    Args:
      config: of the run; its mesh gives way to the cluster's number of devices.
      cluster: described, or this process's CPU devices.

    Raises:
      JspeedError: what cannot be laid out or compiled, and what would.
    """
    remarks: list[str] = []
    described = cluster.target.platform == "cuda"
    platform = "described_gpu" if described else "cpu"
    factory = model_factory(config, platform=platform, remarks=remarks)
    if not described and factory.config.attention == "cudnn":
        raise ConfigError(
            '"model.attention.implementation": cudnn runs on NVIDIA GPUs only. Use "auto", or plan '
            "for a GPU."
        )
    program = make_program(factory)
    config, devices = for_devices(config, cluster.gpus, remarks)
    mesh = cluster.mesh(mesh_shape(config, devices))
    config = config.resolve_auto(abstract_facts(config, remarks))
    run = plan_run(config, program, mesh)
    remarks += idle_axes(run.layout)
    compiled, batch_bytes = _compile(config, program, run, described=described)
    if STAND_IN in compiled.text:
        remarks.append(
            "cuDNN's attention cannot be compiled without a GPU: planned with attention block by "
            "block, which holds the same arrays, and timed as one kernel."
        )
    remarks += [f"not in this plan: {key}" for key in map(str, config.switched_on_later())]
    return _put_together(
        config, cluster, factory, program, run, compiled, batch_bytes, tuple(remarks)
    )


def _compile(
    config: Config, program: Program, run: RunPlan, *, described: bool
) -> tuple[Compiled, int]:
    layout = run.layout
    state = abstract_state(program, run.optimizer, layout, run.loss_scale)
    batch = step_batch(config, run)
    with _whole_stacks():
        step = jit_step(config, program, language_model_loss, run, described=described)
        lowered = step.lower(state, batch)
    compiled = compile_lowered(lowered, layout.sizes)
    rows = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    return compiled, rows // layout.batch_shards


@contextmanager
def _whole_stacks() -> Iterator[None]:
    """Lets operations remember all the functions that asked for them, not the innermost alone, so
    that buffers can be told by module."""
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    jax.config.update(name, _STACK)
    try:
        yield
    finally:
        jax.config.update(name, before)


def step_batch(config: Config, run: RunPlan) -> dict[str, Any]:
    """The shapes of a step's batch as the engine places it:
    `[accumulation, micro batch x batch shards, sequence]`."""
    sharding = NamedSharding(run.layout.mesh, run.layout.batch_spec(1))
    return {
        name: jax.ShapeDtypeStruct(
            (run.batch.accumulation, *leaf.shape), leaf.dtype, sharding=sharding
        )
        for name, leaf in token_batch(config, run).items()
    }


def _put_together(
    config: Config,
    cluster: Cluster,
    factory: ModelFactory,
    program: Program,
    run: RunPlan,
    compiled: Compiled,
    batch_bytes: int,
    remarks: tuple[str, ...],
) -> Plan:
    state = explain_plan(program, run)
    origins = Origins(compiled.text, module_classes(program.blueprint))
    length = step_batch(config, run)["input_ids"].shape[-1]
    tokens = run.batch.train_batch_size * length
    split = run.layout.sizes["tensor"] * run.layout.sizes["seq"] * run.layout.sizes["pipe"]
    return Plan(
        cluster=cluster,
        family=factory.family,
        state=state,
        run=run,
        tokens=tokens,
        memory=account(
            compiled, state, batch_bytes=batch_bytes, limit=cluster.limit_bytes, origins=origins
        ),
        traffic=summarise(compiled.collectives),
        volume=volume(
            compiled.collectives,
            parameters=state.parameters,
            stage=run.layout.stage,
            accumulation=run.batch.accumulation,
        ),
        time=time_step(compiled.module, cluster, run.layout.sizes),
        model_flops=tokens * factory.flops_per_token(length) / run.layout.batch_shards / split,
        remarks=remarks,
    )


def summarise(collectives: Sequence[Collective]) -> tuple[Traffic, ...]:
    """One entry per kind, axes and dtype: how often, and the bytes of all of them, whole."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in collectives:
        if not one.axes:  # every device is on its own
            continue
        key = (one.kind, "+".join(one.axes), one.dtype)
        entry = found.setdefault(
            key,
            {
                "kind": one.kind,
                "axis": key[1],
                "dtype": one.dtype,
                "count": 0,
                "bytes": 0,
                "overlappable_bytes": 0,
            },
        )
        entry["count"] += one.count
        entry["bytes"] += one.count * one.whole.bytes
        if one.asynchronous:
            entry["overlappable_bytes"] += one.count * one.whole.bytes
    return tuple(sorted(found.values(), key=lambda entry: -entry["bytes"]))

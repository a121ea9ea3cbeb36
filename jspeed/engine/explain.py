"""What a run file's layout does, for any number of devices and without data or devices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from jspeed.config import (
    AttentionConfig,
    BatchConfig,
    Config,
    compute_elastic_config,
    resolve_batch,
)
from jspeed.core.errors import ConfigError
from jspeed.engine.abstract_run import (
    abstract_facts,
    attention_remark,
    for_devices,
    idle_axes,
    model_factory,
    token_batch,
)
from jspeed.engine.build import mesh_shape, plan_run
from jspeed.engine.pipeline import Pipeline, pipeline_of
from jspeed.engine.state_explanation import explain_plan, gather_notes
from jspeed.layout.explain import Explanation
from jspeed.layout.mesh import AnyMesh, make_abstract_mesh
from jspeed.models import ModelFactory
from jspeed.training.program import make_program


@dataclass(frozen=True)
class RunExplanation:
    """Where the training state of a run file would live.

    Attributes:
      state: of every parameter.
      remarks: what was assumed, and what would keep the run from training as it stands.
      not_built: the keys that training refuses, each with its reason.
      pipeline: its stages and their schedule; None without.
    """

    state: Explanation
    remarks: tuple[str, ...]
    not_built: tuple[str, ...]
    pipeline: Pipeline | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            **self.state.to_json(),
            "pipeline": None if self.pipeline is None else self.pipeline.to_json(),
            "remarks": list(self.remarks),
            "later": list(self.not_built),
        }


def explain_run(config: Config, *, devices: int | None = None) -> RunExplanation:
    """Explains where the training state of a run file would live.

    Args:
      config: with a `model` section; `data` and `run` are not needed.
      devices: to lay it out for, `mesh.data` giving way; None takes those of the mesh.

    Raises:
      ConfigError, LayoutError, ModelError: what cannot be laid out, and how it would.
    """
    remarks: list[str] = []
    factory = _factory(config, remarks)
    program = make_program(factory)
    mesh = make_abstract_mesh(mesh_shape(*for_devices(config, devices, remarks)))
    config = config.resolve_auto(abstract_facts(config, remarks))
    config = _with_fitting_batch(config, mesh, remarks)
    plan = plan_run(config, program, mesh)
    remarks += idle_axes(plan.layout)
    attention = attention_remark(config)
    if attention is not None:
        remarks.append(attention)
    notes = gather_notes(program, factory.loss_fn, plan.layout, token_batch(config, plan))
    state = explain_plan(program, plan, notes)
    later = tuple(map(str, config.switched_on_later()))
    return RunExplanation(state, tuple(remarks), later, pipeline_of(config, plan))


def _factory(config: Config, remarks: list[str]) -> ModelFactory:
    # Which attention computes does not move an array, and the named one may need a device.
    if config.model is not None:
        model = dataclasses.replace(config.model, attention=AttentionConfig("xla"))
        config = dataclasses.replace(config, model=model)
    return model_factory(config, platform="cpu", remarks=remarks)


def _with_fitting_batch(config: Config, mesh: AnyMesh, remarks: list[str]) -> Config:
    """Batch sizes move no state: what does not hold on these devices becomes a remark."""
    shards = math.prod(mesh.shape[axis] for axis in ("replica", "data", "expert"))
    try:
        chosen = resolve_batch(config, shards)
    except ConfigError as error:
        remarks.append(f"training would refuse these batch sizes: {error}")
        # As many microbatches as any schedule needs.
        batch = BatchConfig(None, config.batch.micro_batch_size or 1, mesh.shape["pipe"])
        return dataclasses.replace(config, batch=batch, elasticity=None)
    if config.elasticity is not None:
        counts = compute_elastic_config(config).gpu_counts
        remarks.append(
            f'"elasticity" chose a batch of {chosen.train_batch_size} rows, here '
            f"{chosen.micro_batch_size} per device x {chosen.accumulation} microbatch(es) x "
            f"{shards} shard(s); it holds on {', '.join(map(str, counts))} devices"
        )
    return config

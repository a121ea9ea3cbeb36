"""What a run file's layout does, for any number of devices and without data or devices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.config import (
    AttentionConfig,
    AutoFacts,
    BatchConfig,
    Config,
    ModelConfig,
    resolve_batch,
)
from jspeed.core.errors import ConfigError
from jspeed.data import Tokenizer
from jspeed.engine.build import RunPlan, mesh_shape, plan_run
from jspeed.engine.state_explanation import explain_plan, gather_notes
from jspeed.layout.explain import Explanation
from jspeed.layout.mesh import AnyMesh, make_abstract_mesh
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Layout
from jspeed.models import build_model
from jspeed.nn import language_model_loss
from jspeed.training.program import Program, make_program


@dataclass(frozen=True)
class RunExplanation:
    """Where the training state of a run file would live.

    Attributes:
      state: of every parameter.
      remarks: what was assumed, and what would keep the run from training as it stands.
      not_built: the keys that training refuses, each with its reason.
    """

    state: Explanation
    remarks: tuple[str, ...]
    not_built: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            **self.state.to_json(),
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
    if config.model is None:
        raise ConfigError(
            '"model": missing. explain lays out the model of a run file; add a "model" section, as '
            '{"family": "gpt2", "layers": 12, "hidden_size": 768, "heads": 12, '
            '"sequence_length": 1024}.'
        )
    remarks: list[str] = []
    mesh = make_abstract_mesh(mesh_shape(*_for_devices(config, devices, remarks)))
    program = _program(config, config.model, remarks)
    config = config.resolve_auto(_facts(config, remarks))
    plan = plan_run(_with_fitting_batch(config, mesh, remarks), program, mesh)
    remarks += _idle_axes(plan.layout)
    notes = gather_notes(program, language_model_loss, plan.layout, _token_batch(config, plan))
    state = explain_plan(program, plan, notes)
    return RunExplanation(state, tuple(remarks), tuple(map(str, config.switched_on_later())))


def _for_devices(config: Config, devices: int | None, remarks: list[str]) -> tuple[Config, int]:
    """The configuration with `mesh.data` open where another number of devices is asked for."""
    mesh = config.mesh
    others = mesh.pipe * mesh.replica * mesh.expert * mesh.seq * mesh.tensor
    if devices is None:
        data = mesh.data
        if data == -1:
            data = max(1, config.zero.mics_shard_size)
            remarks.append(
                f'"mesh.data" takes all devices there are; laid out for {others * data}. '
                "--devices N lays out for another number."
            )
        return config, others * data
    if mesh.data != -1 and mesh.data * others != devices:
        remarks.append(
            f'"mesh.data": {mesh.data} gives way to {devices} devices; to train on them, leave it '
            "out."
        )
        config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=-1))
    return config, devices


def _program(config: Config, model: ModelConfig, remarks: list[str]) -> Program:
    vocabulary = model.vocab_size
    if vocabulary is None:
        vocabulary, said = _vocabulary(config)
        remarks.append(said)
    # Which attention computes does not move an array, and the named one may need a device.
    model = dataclasses.replace(model, attention=AttentionConfig("xla"))
    return make_program(build_model(model, vocab_size=vocabulary, platform="cpu"))


def _vocabulary(config: Config) -> tuple[int, str]:
    """The size of the vocabulary without reading the data, and where it comes from."""
    data = config.data
    if data is None:
        raise ConfigError(
            '"model.vocab_size": missing, and there is no "data" section to take it from. Set it '
            "to the number of tokens."
        )
    given = data.tokenizer
    if given.vocab_size is None:
        if given.path is None:
            raise ConfigError('"data.tokenizer.path": missing; expected a tokenizer.json.')
        size = Tokenizer.load(given.path).vocab_size
        return size, f'vocabulary {size:,}, of the tokenizer in "data.tokenizer.path".'
    said = f'vocabulary {given.vocab_size:,}, from "data.tokenizer.vocab_size"'
    if given.kind == "bpe":
        said += "; a tokenizer trained on little text has fewer"
    return given.vocab_size, f"{said}."


def _facts(config: Config, remarks: list[str]) -> AutoFacts:
    """What stands for an "auto" that only a run can resolve; none of these moves an array."""
    if config.autos:
        remarks.append(
            f'"auto" is left open here, and to be set for training: {", ".join(config.autos)}.'
        )
    rates = any(path.endswith("lr") for path in config.autos)
    sizes = any("batch_size" in path for path in config.autos)
    return AutoFacts(
        total_steps=(config.run.steps if config.run else 0) or 1,
        learning_rate=1.0 if rates else None,
        micro_batch_size=1 if sizes else None,
    )


def _idle_axes(layout: Layout) -> list[str]:
    """A `tensor` axis that no rule names holds the same parameters on all of its devices."""
    size = layout.sizes["tensor"]
    entries = (entry for leaf in layout.leaves.values() for entry in leaf.base)
    if size == 1 or any("tensor" in axes_of(entry) for entry in entries):
        return []
    return [
        f'"mesh.tensor": {size}, but no rule splits a parameter over it: each is held {size} '
        'times. Add rules as "mesh.rules".'
    ]


def _with_fitting_batch(config: Config, mesh: AnyMesh, remarks: list[str]) -> Config:
    """Batch sizes move no state: what does not hold on these devices becomes a remark."""
    shards = math.prod(mesh.shape[axis] for axis in ("replica", "data", "expert"))
    try:
        resolve_batch(config, shards)
    except ConfigError as error:
        remarks.append(f"training would refuse these batch sizes: {error}")
        batch = BatchConfig(None, config.batch.micro_batch_size or 1, None)
        return dataclasses.replace(config, batch=batch)
    return config


def _token_batch(config: Config, plan: RunPlan) -> dict[str, Any]:
    model, data = config.model, config.data
    assert model is not None
    length = data.sequence_length if data else model.sequence_length
    rows = plan.batch.micro_batch_size * plan.layout.batch_shards
    names = ["input_ids", "labels"]
    if data is not None and data.document_mask:
        names += ["segment_ids", "positions"]
    return {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}

"""What a run file's layout does, for any number of devices and without data or devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.config import (
    AttentionConfig,
    AutoFacts,
    BatchConfig,
    Config,
    ModelConfig,
    resolve_batch,
)
from jspeed.core._compat import shard_map
from jspeed.core.errors import ConfigError
from jspeed.core.tree import named_leaves
from jspeed.data import Tokenizer
from jspeed.engine.build import RunPlan, mesh_shape, plan_run
from jspeed.layout.at_use import AtHome, Report, call_with_gather_at_use
from jspeed.layout.explain import Explanation, StateArray, explain
from jspeed.layout.mesh import AnyMesh, make_abstract_mesh
from jspeed.layout.rules import Entry, axes_of
from jspeed.layout.zero import Layout, Role, manual_spec
from jspeed.models import build_model
from jspeed.nn import language_model_loss
from jspeed.training.program import LossFn, Program, loss_parts, make_program
from jspeed.training.state import TrainState, abstract_parameters, abstract_state


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


def explain_plan(
    program: Program, plan: RunPlan, notes: tuple[tuple[str, str], ...] = ()
) -> Explanation:
    """Explains where the training state of a planned run lives; the plan's mesh may be abstract."""
    state = abstract_state(program, plan.optimizer, plan.layout, plan.loss_scale)
    return explain(plan.layout, state_arrays(state, plan.layout), notes, program.logical_axes)


def state_arrays(state: TrainState, layout: Layout) -> list[StateArray]:
    """Every array of a training state (or its shapes) with its role."""

    def row(path: str, role: Role | None, leaf: Any) -> StateArray:
        spec: list[Entry] = list(leaf.sharding.spec) if role else []
        spec += [None] * (leaf.ndim - len(spec))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return StateArray(path, role, tuple(leaf.shape), leaf.dtype.name, tuple(spec))

    rows = [row(path, Role.MASTER, leaf) for path, leaf in named_leaves(state.master)]
    rows += [row(path, Role.PARAM, leaf) for path, leaf in state.copies.items()]
    for path, leaf in named_leaves(state.opt_state):
        owner = layout.owner(path, leaf.shape)
        if owner is None:
            rows.append(row(f"opt_state/{path}", None, leaf))
        else:
            rows.append(row(owner, Role.MOMENTS, leaf))
    for part in ("step", "updates", "mutable", "rng", "loss_scale"):
        for path, leaf in named_leaves(getattr(state, part)):
            rows.append(row(f"{part}/{path}".rstrip("/"), None, leaf))
    return rows


def gather_notes(
    program: Program, loss_fn: LossFn, layout: Layout, batch: Mapping[str, Any]
) -> tuple[tuple[str, str], ...]:
    """The parameters that the loss does not let ZeRO-3 gather layer by layer, with the reasons.

    Args:
      program: the model.
      loss_fn: as for training.
      layout: of its parameters.
      batch: shapes of one global microbatch, `[micro batch x batch shards, ...]`.

    Returns:
      `(parameter, reason)` pairs; none below stage 3, where nothing is gathered at use.
    """
    gathered = {path: plan for path in layout.leaves if (plan := layout.gathered(path))}
    if not gathered:
        return ()
    params, mutable = abstract_parameters(program)
    treedef, report = jax.tree.structure(params), Report()

    def run(values: list[Any], mutable: Any, batch: Any, key: jax.Array) -> Any:
        tree = jax.tree.unflatten(treedef, values)
        result, _ = program.call(loss_fn, tree, mutable, batch, key, train=True)
        return loss_parts(result)

    def on_shard(values: dict[str, Any], mutable: Any, batch: Any, key: jax.Array) -> Any:
        homes = [
            AtHome(path, gathered[path], value) if path in gathered else value
            for path, value in values.items()
        ]
        key = jax.random.wrap_key_data(key)
        return call_with_gather_at_use(run, homes, mutable, batch, key, refetch=True, report=report)

    values, specs = {}, {}
    for path, leaf in layout.leaves.items():
        dtype = "float32" if path in gathered else layout.compute_dtype
        values[path] = jax.ShapeDtypeStruct(leaf.shape, dtype)
        spec = leaf.sharded_spec() if path in gathered else leaf.base
        specs[path] = manual_spec(spec)
    whole = PartitionSpec()
    traced = shard_map(
        on_shard,
        mesh=layout.mesh,
        in_specs=(
            specs,
            jax.tree.map(lambda _: whole, mutable),
            jax.tree.map(lambda _: layout.batch_spec(), batch),
            whole,
        ),
        out_specs=whole,
        axis_names=frozenset(layout.mesh.axis_names) - frozenset(layout.automatic_axes),
    )
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    jax.eval_shape(traced, values, mutable, batch, key)
    return tuple(report.notes)


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

"""Where the training state of a planned run lives, and what its loss does not let ZeRO-3 gather."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.tree import named_leaves
from jspeed.engine.build import RunPlan
from jspeed.layout.at_use import AtHome, Report, call_with_gather_at_use
from jspeed.layout.explain import Explanation, StateArray, explain
from jspeed.layout.rules import Entry
from jspeed.layout.zero import Layout, Role, manual_spec
from jspeed.offload.stores import TENSORS
from jspeed.training.program import LossFn, Program, loss_parts
from jspeed.training.state import TrainState, abstract_parameters, abstract_state


def explain_plan(
    program: Program, plan: RunPlan, notes: tuple[tuple[str, str], ...] = ()
) -> Explanation:
    """Explains where the training state of a planned run lives; the plan's mesh may be abstract."""
    state = abstract_state(program, plan.optimizer, plan.layout, plan.loss_scale)
    streamed = next(iter(state.streamed.values()), ())
    return explain(
        plan.layout,
        state_arrays(state, plan.layout),
        notes,
        program.logical_axes,
        host_tensors=len(streamed) or len(TENSORS),
    )


def state_arrays(state: TrainState, layout: Layout) -> list[StateArray]:
    """Every array of a training state (or its shapes) with its role."""

    def row(path: str, role: Role | None, leaf: Any) -> StateArray:
        spec: list[Entry] = list(leaf.sharding.spec) if role else []
        spec += [None] * (leaf.ndim - len(spec))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return StateArray(path, role, tuple(leaf.shape), leaf.dtype.name, tuple(spec))

    rows = [
        row(path, Role.PARAM if path in layout.on_host | layout.frozen else Role.MASTER, leaf)
        for path, leaf in named_leaves(state.master)
    ]
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
    program: Program, loss_fn: LossFn, layout: Layout, batch: Any
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


def microbatch_shapes(batch: Any, plan: RunPlan) -> Any:
    """The shapes of one global microbatch, of a batch (arrays or shapes) with any number of
    rows."""
    rows = plan.batch.micro_batch_size * plan.layout.batch_shards

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        given = leaf.dtype if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf).dtype
        dtype = jax.dtypes.canonicalize_dtype(given)
        return jax.ShapeDtypeStruct((rows, *np.shape(leaf)[1:]), dtype)

    return jax.tree.map(shape, batch)

"""The update of parameters whose state lies in the hosts' pinned memory, inside the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.tree import map_named, named_leaves
from jspeed.layout.zero import Layout, Role
from jspeed.offload.streamed import Buffers, UpdateChunk, stream_update
from jspeed.training.state import LEAF, TrainState, on_host

Streamed = dict[str, Buffers]
StreamedUpdate = Callable[
    [TrainState, Any, jax.Array, jax.Array | None], tuple[dict[str, jax.Array], Streamed]
]
"""`(state, reduced gradients, factor, whether to apply or None for always) -> (parameters in the
compute dtype, placed as the moments; what is streamed)`."""


def make_streamed_update(
    optimizer: optax.GradientTransformation, layout: Layout, *, most: int
) -> StreamedUpdate:
    """The update of a layout's parameters `on_host` by a step that streams their state.

    Args:
      optimizer: elementwise.
      layout: `streamed`.
      most: elements of the chunks that are on a device at a time.
    """
    specs = {
        path: PartitionSpec(*layout.role_spec(path, Role.MOMENTS))
        for path in layout.leaves
        if path in layout.on_host
    }
    rule = _Rule(optimizer)

    def on_shard(streamed: Streamed, gradients: Any, params: Any, scalars: Any) -> Any:
        update, new = rule.of_chunk(scalars), {}
        for path in specs:
            param = params.get(path)
            if param is None:
                param = jnp.zeros(gradients[path].shape, layout.compute_dtype)
            state = streamed[path]
            if new:  # one parameter after another, or all first chunks came down at once
                last = next(reversed(new))
                new[last], state = lax.optimization_barrier((new[last], state))
            streamed[path], new[path] = stream_update(
                update, state, gradients[path], param, most=most
            )
        return new, streamed

    def update(
        state: TrainState, reduced: Any, factor: jax.Array, applied: jax.Array | None
    ) -> tuple[dict[str, jax.Array], Streamed]:
        held = {
            path: leaf
            for path, leaf in on_host(state.master, layout).items()
            if layout.role_spec(path, Role.MASTER) == layout.role_spec(path, Role.MOMENTS)
        }
        tensors = {path: dict.fromkeys(state.streamed[path], spec) for path, spec in specs.items()}
        return shard_map(
            on_shard,
            mesh=layout.mesh,
            in_specs=(tensors, specs, {path: specs[path] for path in held}, PartitionSpec()),
            out_specs=(specs, tensors),
        )(state.streamed, on_host(reduced, layout), held, rule.scalars(state, factor, applied))

    return update


class _Rule:
    """An elementwise optimizer, as it updates a chunk."""

    def __init__(self, optimizer: optax.GradientTransformation) -> None:
        self._optimizer = optax.with_extra_args_support(optimizer)
        self._form = jax.eval_shape(optimizer.init, {LEAF: jax.ShapeDtypeStruct((1,), jnp.float32)})

    def scalars(
        self, state: TrainState, factor: jax.Array, applied: jax.Array | None
    ) -> dict[str, Any]:
        """What all chunks of a step follow."""
        known = dict(named_leaves(state.opt_state))
        own = [path for path, _ in named_leaves(self._form) if not path.endswith(f"/{LEAF}")]
        of_step = {"factor": factor, "updates": state.updates, "applied": applied}
        return of_step | {"optimizer": {path: known[path] for path in own}}

    def of_chunk(self, scalars: dict[str, Any]) -> UpdateChunk:
        """The update of a chunk."""

        def update(chunk: Buffers, gradient: jax.Array) -> Buffers:
            def present(path: str, _: Any) -> jax.Array:
                tensor = path.removesuffix(f"/{LEAF}")
                return chunk[tensor] if tensor != path else scalars["optimizer"][path]

            master = {LEAF: chunk["master"]}
            steps, after = self._optimizer.update(
                {LEAF: gradient.astype(jnp.float32) * scalars["factor"]},
                map_named(present, self._form),
                master,
                schedule_position=scalars["updates"],
            )
            new = {path.removesuffix(f"/{LEAF}"): leaf for path, leaf in named_leaves(after)}
            updated: Any = optax.apply_updates(master, steps)
            new["master"] = updated[LEAF]
            applied = scalars["applied"]
            if applied is None:
                return {name: new[name] for name in chunk}
            return {name: jnp.where(applied, new[name], old) for name, old in chunk.items()}

        return update

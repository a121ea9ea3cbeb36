"""Looking up rows of an embedding table, also of one that `tensor` splits by its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.core.shapes import Array, Float, Int
from jspeed.layout.context import automatic_sizes


def embed(
    table: Float[Array, "vocabulary features"],
    ids: Int[Array | np.ndarray, "*tokens"],
    *,
    over_tensor: bool = True,
) -> Float[Array, "*tokens features"]:
    """`table[ids]`.

    Where an automatic `tensor` axis divides the vocabulary, each of its devices looks up the ids
    whose rows it holds, and the results are summed (Megatron-LM, Shoeybi et al., 2019, section 3);
    the table is never gathered, forwards or backwards. There an id outside of the vocabulary gives
    zeros. Over `seq` each device looks up the ids of its part of the sequence, and the gradients of
    the table are summed; the compiler's partitioner would gather those of all tokens.

    Args:
      table: `[vocabulary, features]`.
      ids: `[...]` int32; their second dimension is the sequence, if there is one.
      over_tensor: whether `tensor` splits the table where it can; False for one of positions, which
        every device holds whole.

    Returns:
      `[..., features]` in the table's dtype.
    """
    sizes = automatic_sizes()
    in_parts = over_tensor and "tensor" in sizes and table.shape[0] % sizes["tensor"] == 0
    if not in_parts:
        return _lookup_of_parts(table, jnp.asarray(ids)) if "seq" in sizes else table[ids]
    return _split_lookup(table, jnp.asarray(ids))


def _lookup_of_parts(table: jax.Array, ids: jax.Array) -> jax.Array:
    _, of_ids, of_result = _specs(ids, automatic_sizes())
    if "seq" not in of_ids:
        return table[ids]
    return _island(lambda table, ids: table[ids], (PartitionSpec(), of_ids), of_result)(table, ids)


def _specs(
    ids: jax.Array, sizes: Mapping[str, int]
) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Of the table, the ids and what is looked up, over all automatic axes."""
    entries: list[str | None] = [None] * ids.ndim
    if "seq" in sizes and ids.ndim > 1 and ids.shape[1] % sizes["seq"] == 0:
        entries[1] = "seq"
    return (
        PartitionSpec("tensor", None),
        PartitionSpec(*entries),
        PartitionSpec(*entries, None),
    )


def _island(function: Callable[..., jax.Array], in_specs: tuple, out_specs: PartitionSpec):
    return shard_map(
        function,
        mesh=context_mesh(),
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(automatic_sizes()),
    )


def _own_rows(ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Ids as rows of this device's part of the table, and which of them are its own."""
    local = ids - jax.lax.axis_index("tensor") * rows
    return local, (local >= 0) & (local < rows)


@jax.custom_vjp
def _split_lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    of_table, of_ids, of_result = _specs(ids, automatic_sizes())

    def lookup(part: jax.Array, ids: jax.Array) -> jax.Array:
        local, own = _own_rows(ids, part.shape[0])
        found = jnp.where(own[..., None], part[jnp.where(own, local, 0)], 0)
        return jax.lax.psum(found, "tensor")

    return _island(lookup, (of_table, of_ids), of_result)(table, ids)


def _forward(table: jax.Array, ids: jax.Array):
    return _split_lookup(table, ids), (ids, jnp.zeros((table.shape[0], 0), table.dtype))


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    ids, like = saved
    sizes = automatic_sizes()
    of_table, of_ids, of_result = _specs(ids, sizes)
    rows = like.shape[0] // sizes["tensor"]

    def scatter(ids: jax.Array, gradient: jax.Array) -> jax.Array:
        local, own = _own_rows(ids, rows)
        zeros = jnp.zeros((rows, gradient.shape[-1]), like.dtype)
        part = zeros.at[jnp.where(own, local, rows)].add(gradient.astype(like.dtype), mode="drop")
        return jax.lax.psum(part, "seq") if "seq" in of_ids else part

    return _island(scatter, (of_ids, of_result), of_table)(ids, gradient), None


_split_lookup.defvjp(_forward, _backward)

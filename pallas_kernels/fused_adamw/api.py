"""The fused AdamW update of a tree of arrays: checks, choice of implementation, sharding."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import _dispatch
from pallas_kernels.fused_adamw.reference import AdamWScalars, LeafUpdate, WeightDecay, check_decay
from pallas_kernels.fused_adamw.reference import reference_update as _reference
from pallas_kernels.fused_adamw.triton import MOST_ELEMENTS, triton_update

_GRADIENTS = ("float32", "bfloat16", "float16")


class AdamWUpdate(NamedTuple):
    """Trees as the parameters', and what was seen of the gradients.

    Attributes:
      params: updated, float32.
      mu: first moments, float32.
      nu: second moments, float32.
      copies: the updated parameters in `copy_dtypes`, None where none was asked for.
      overflow: bool scalar, whether a gradient was not finite. Parameters and moments were updated
        with it all the same, unless `skip` was set. Costs nothing where it is not used.
    """

    params: Any
    mu: Any
    nu: Any
    copies: Any
    overflow: jax.Array


def fused_adamw_update(
    gradients: Any,
    mu: Any,
    nu: Any,
    params: Any,
    scalars: AdamWScalars,
    *,
    decay: WeightDecay = "decoupled",
    copy_dtypes: Any = None,
    shardings: Any = None,
    implementation: _dispatch.Implementation | None = None,
    interpret: bool = False,
) -> AdamWUpdate:
    """One step of AdamW (arXiv:1711.05101), or of Adam with L2 decay, in one pass over memory.

    Per element, in float32 and with `g` the gradient times `gradient_factor`:
    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    `p -= lr * (m / c1 / (sqrt(v / c2) + eps) + weight_decay * p)`.

    Under `jit` with `mu`, `nu` and `params` donated, the kernel updates them in place and allocates
    nothing. It moves 28 bytes per element with bfloat16 gradients and copies, and so does what XLA
    makes of `optax.adamw` where nothing transposes the state: see docs/kernels-adam.md.

    Args:
      gradients: an array or a tree of arrays of any shapes: float32, bfloat16 or float16.
      mu: first moments, float32, of the same structure and shapes.
      nu: second moments, likewise.
      params: parameters, likewise.
      scalars: of this step; none of them is compiled in.
      decay: how `scalars.weight_decay` acts.
      copy_dtypes: the dtype of a copy of all parameters, or a tree of dtypes, None for leaves
        without a copy; None for no copies at all.
      shardings: a tree of `NamedSharding`, of one mesh, as all arrays of a leaf are placed: each
        device then updates its own part. None where parameters say it themselves (outside of `jit`,
        or split over Explicit axes of a mesh), are not split, or are a device's own part already;
        of others, split over Auto axes inside of `jit`, XLA would gather what the kernel reads.
      implementation: `triton`, `xla` or `reference`; None for the kernel on NVIDIA GPUs and XLA
        elsewhere, which also updates what is too large for the kernel's 32-bit offsets.
      interpret: run the kernel without a GPU.

    Raises:
      ValueError: trees, shapes or dtypes do not fit, or the implementation cannot be had.
    """
    check_decay(decay)
    leaves, tree = jax.tree.flatten(params)
    columns = [
        _column(name, value, tree, leaves)
        for name, value in (("gradients", gradients), ("mu", mu), ("nu", nu), ("params", params))
    ]
    dtypes = _copies(copy_dtypes, tree)

    def update(scalars: jax.Array, overflow: jax.Array, *columns: Any) -> tuple[Any, jax.Array]:
        rows = []
        for *row, dtype in zip(*columns, dtypes, strict=True):
            new = _leaf(row, scalars, overflow, dtype, decay, implementation, interpret)
            overflow = new.overflow
            rows.append(tuple(one for one in new[:4] if one is not None))
        return rows, overflow

    vector, none_seen = scalars.vector(), jnp.zeros((1,), jnp.int32)
    if shardings is None:
        placed = _placed(leaves)
    else:
        placed = jax.tree.leaves(shardings, is_leaf=lambda one: isinstance(one, NamedSharding))
    if not placed:
        rows, overflow = update(vector, none_seen, *columns)
    else:
        rows, overflow = _on_own_parts(update, placed, vector, none_seen, columns, dtypes)
    new_params, new_mu, new_nu = (tree.unflatten([row[i] for row in rows]) for i in range(3))
    copies = tree.unflatten([row[3] if len(row) > 3 else None for row in rows])
    return AdamWUpdate(new_params, new_mu, new_nu, copies, overflow[0] != 0)


def _leaf(
    row: list[Any],
    scalars: jax.Array,
    overflow: jax.Array,
    copy_dtype: Any,
    decay: WeightDecay,
    implementation: _dispatch.Implementation | None,
    interpret: bool,
) -> LeafUpdate:
    xla = functools.partial(_reference, decay=decay, copy_dtype=copy_dtype)
    implementations: dict[_dispatch.Implementation, Any] = {"xla": xla, "reference": xla}
    if row[3].size <= MOST_ELEMENTS:
        implementations["triton"] = functools.partial(
            triton_update, decay=decay, copy_dtype=copy_dtype, interpret=interpret
        )
    return _dispatch.call(
        "fused_adamw", implementations, implementation, *row, scalars, overflow, interpret=interpret
    )


def _on_own_parts(
    update: Any,
    shardings: list[NamedSharding],
    scalars: jax.Array,
    overflow: jax.Array,
    columns: list[list[jax.Array]],
    dtypes: list[Any],
) -> tuple[Any, jax.Array]:
    """Each device updates its own part of all leaves, in one `shard_map`."""
    if len(shardings) != len(columns[0]):
        raise ValueError(
            f"shardings: {len(shardings)} for {len(columns[0])} parameters; expected a "
            "NamedSharding for each."
        )
    mesh = shardings[0].mesh
    specs = [one.spec for one in shardings]
    if AxisType.Explicit in mesh.axis_types:
        columns = [
            [jax.sharding.reshard(*pair) for pair in zip(column, shardings, strict=True)]
            for column in columns
        ]

    def on_shard(scalars: jax.Array, overflow: jax.Array, *columns: Any) -> tuple[Any, jax.Array]:
        rows, seen = update(scalars, overflow, *columns)
        return rows, jax.lax.pmax(seen, mesh.axis_names)

    rows = [
        (spec,) * (3 if dtype is None else 4) for spec, dtype in zip(specs, dtypes, strict=True)
    ]
    whole = PartitionSpec()
    mapped = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(whole, whole, *([specs] * len(columns))),
        out_specs=(rows, whole),
        check_vma=False,
    )
    return mapped(scalars, overflow, *columns)


def _placed(leaves: list[Any]) -> list[NamedSharding]:
    """How arrays are split over a mesh, as far as it can be seen; nothing if none is."""
    found = [
        jax.typeof(one).sharding if isinstance(one, Tracer) else one.sharding
        for one in leaves
        if isinstance(one, jax.Array)
    ]
    split = [one for one in found if isinstance(one, NamedSharding) and not one.is_fully_replicated]
    if not split or len(found) < len(leaves):
        return []
    whole = NamedSharding(split[0].mesh, PartitionSpec())
    return [one if isinstance(one, NamedSharding) and one in split else whole for one in found]


def _column(name: str, value: Any, tree: Any, leaves: list[Any]) -> list[jax.Array]:
    """The leaves of one argument, checked against the parameters."""
    if jax.tree.structure(value) != tree:
        raise ValueError(
            f"{name}: expected the structure of params, {tree}; got {jax.tree.structure(value)}."
        )
    column = jax.tree.leaves(value)
    expected = _GRADIENTS if name == "gradients" else ("float32",)
    for (path, _), one, like in zip(
        jax.tree_util.tree_leaves_with_path(value), column, leaves, strict=True
    ):
        where = name + jax.tree_util.keystr(path)
        if np.shape(one) != np.shape(like):
            raise ValueError(
                f"{where}: shape {np.shape(one)}; expected {np.shape(like)}, its parameter's."
            )
        if str(one.dtype) not in expected:
            raise ValueError(f"{where}: dtype {one.dtype}; expected {' or '.join(expected)}.")
    return column


def _copies(dtypes: Any, tree: Any) -> list[Any]:
    """The dtype of each leaf's copy, or None."""
    if dtypes is None:
        return [None] * tree.num_leaves
    if isinstance(dtypes, str | type | np.dtype) or hasattr(dtypes, "dtype"):
        return [_copy_dtype(dtypes)] * tree.num_leaves
    each = jax.tree.leaves(dtypes, is_leaf=lambda one: one is None)
    if len(each) != tree.num_leaves:
        raise ValueError(
            f"copy_dtypes: {len(each)} for {tree.num_leaves} parameters; expected one dtype, or a "
            "dtype or None for each parameter."
        )
    return [None if one is None else _copy_dtype(one) for one in each]


def _copy_dtype(given: Any) -> Any:
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f'copy_dtypes: {given!r}; expected a floating dtype, such as "bfloat16" or "float16".'
        )
    return dtype

"""The fused AdamW update of one array as a Pallas-Triton kernel.

Cost per element, with fp32 moments and parameter: 12 bytes of state are read and written, the
gradient is read once and the copy written once; with a bf16 gradient and a bf16 copy, or with a
float32 gradient and no copy, that is 28 bytes, and about 20 floating-point operations. So the limit
is memory bandwidth alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.fused_adamw.reference import (
    AdamWScalars,
    LeafUpdate,
    WeightDecay,
    adamw,
)

BLOCK = 512
"""Elements of a program: 4 per thread, 16 bytes of each float32 array. With 8 Triton lays 16-bit
arrays out another way and exchanges values through shared memory."""
NUM_WARPS = 4

MOST_ELEMENTS = 2**31 - BLOCK
"""Triton's offsets are int32."""


def triton_update(
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    param: jax.Array,
    scalars: jax.Array,
    overflow: jax.Array,
    *,
    decay: WeightDecay,
    copy_dtype: Any,
    interpret: bool,
    block: int = BLOCK,
    warps: int = NUM_WARPS,
) -> LeafUpdate:
    """Updates one array in place: `mu`, `nu`, `param` and `overflow` hand their memory over.

    Args:
      gradient: of any shape, float32, bfloat16 or float16.
      mu: the first moment, float32, of that shape.
      nu: the second moment, likewise.
      param: the parameter, likewise.
      scalars: `AdamWScalars.vector()`, float32 `[11]`.
      overflow: int32 `[1]`.
      decay: how `weight_decay` acts.
      copy_dtype: of a copy of the parameter, or None for none.
      interpret: run without a GPU.
      block: elements of a program.
      warps: of a program.
    """
    size, shape = param.size, param.shape
    if size == 0:
        copy = None if copy_dtype is None else param.astype(copy_dtype)
        return LeafUpdate(param, mu, nu, copy, overflow)
    whole = pl.BlockSpec((size,), lambda _: (0,))
    small = [pl.BlockSpec(one.shape, lambda _: (0,)) for one in (scalars, overflow)]
    dtypes = [param.dtype, mu.dtype, nu.dtype]
    dtypes += [] if copy_dtype is None else [copy_dtype]
    update = _compat.triton_call(
        _kernel(size, decay, block),
        name="fused_adamw",
        grid=(pl.cdiv(size, block),),
        in_specs=[small[0], whole, whole, whole, whole, small[1]],
        out_specs=[small[1], *(whole for _ in dtypes)],
        out_shape=[
            jax.ShapeDtypeStruct(overflow.shape, overflow.dtype),
            *(jax.ShapeDtypeStruct((size,), dtype) for dtype in dtypes),
        ],
        num_warps=warps,
        num_stages=1,
        interpret=interpret,
        input_output_aliases={5: 0, 4: 1, 2: 2, 3: 3},
    )
    flat = (array.reshape(size) for array in (gradient, mu, nu, param))
    flag, *arrays = update(scalars, *flat, overflow)
    new_param, new_mu, new_nu, *copy = (array.reshape(shape) for array in arrays)
    return LeafUpdate(new_param, new_mu, new_nu, copy[0] if copy else None, flag)


def _kernel(size: int, decay: WeightDecay, width: int) -> Any:
    full, rest = divmod(size, width)
    load, store = _compat.triton.load, _compat.triton.store

    def kernel(scalars_ref, gradient_ref, mu_ref, nu_ref, param_ref, flag_in, flag_ref, *out_refs):
        del flag_in  # the same memory as `flag_ref`
        block = pl.program_id(0)
        s = AdamWScalars(*(scalars_ref[i] for i in range(len(AdamWScalars._fields))))

        def update(mask: jax.Array | None) -> None:
            at = pl.ds(block * width, width)
            other = None if mask is None else 0.0
            gradient, mu, nu, param = (
                load(ref.at[at], mask=mask, other=other).astype(jnp.float32)
                for ref in (gradient_ref, mu_ref, nu_ref, param_ref)
            )
            new = adamw(gradient, mu, nu, param, s, decay == "l2")
            for ref, value in zip(out_refs, (*new, new[0]), strict=False):  # the copy, if any, last
                store(ref.at[at], value.astype(ref.dtype), mask=mask)
            bad = jnp.max((~jnp.isfinite(gradient)).astype(jnp.int32)) > 0

            @pl.when(bad)
            def _() -> None:
                flag_ref[0] = jnp.int32(1)  # any program may write it: it is the same value

        # Only the last block is masked, so that all others move vectors.
        if full:
            pl.when(block < full)(lambda: update(None))
        if rest:
            pl.when(block == full)(lambda: update(block * width + jnp.arange(width) < size))

    return kernel

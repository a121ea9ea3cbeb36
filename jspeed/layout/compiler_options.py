"""XLA's compiler options, typed and per backend: the one place that names them.

XLA overlaps nothing by default: a layer's matrix product waits for the gather of its weights. At
optimization level O1 it pipelines the collectives of loops and schedules them behind computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

Options = dict[str, bool | int | str]

_GPU = frozenset({"cuda", "gpu"})
# XLA's effort levels are numbered in steps of ten: O0 = 9, O1 = 19.
_O1 = 19


@dataclass(frozen=True)
class CommunicationSettings:
    """The part of `zero_optimization` that decides when XLA communicates and in what pieces.

    Attributes:
      stage: the ZeRO stage.
      overlap_comm: whether communication runs behind computation; None means at stage 3 only.
      reduce_bucket_size: elements up to which reductions are combined into one; 0 leaves it to XLA.
      allgather_bucket_size: elements up to which all-gathers are combined at stages 1 and 2; 0
        leaves it to XLA.
      prefetch_bucket_size: the same at stage 3, where a combined all-gather fetches weights before
        their use.
    """

    stage: int = 0
    overlap_comm: bool | None = None
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000

    @property
    def overlaps(self) -> bool:
        """`overlap_comm` with its default resolved."""
        return self.stage == 3 if self.overlap_comm is None else self.overlap_comm


def compiler_options(
    platform: str,
    zero: CommunicationSettings,
    *,
    compute_dtype: str,
    reduce_dtype: str | None = None,
    automatic_axes: Sequence[str] = (),
    devices: int = 1,
    described: bool = False,
) -> Options:
    """The options to compile a train step with, for `jax.jit(..., compiler_options=...)`.

    Args:
      platform: a JAX platform name; only GPUs and meshes of CPU devices have options.
      zero: overlap and bucket sizes.
      compute_dtype: that weights are gathered in; a bucket's elements times its size is in bytes.
      reduce_dtype: that gradients are reduced in; the compute dtype when None.
      automatic_axes: which of `tensor` and `seq` split anything, so that layers hold collectives of
        their own.
      devices: of the mesh.
      described: the target is a description of a GPU. Products then go to the library, as they do
        on a GPU after autotuning, which needs one.
    """
    if platform == "cpu" and devices > 1:
        # XLA would order independent collectives to run at the same time, and every device's wait
        # in a thread of the pool that they share: with all taken, none of them ever ends.
        return {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    if platform not in _GPU:
        return {}
    options: Options = {}
    if zero.overlaps:
        options["optimization_level"] = _O1
        if automatic_axes:
            # With one collective at a time, a gather would have to end before the next reduction
            # over `tensor` and found no matrix product to run behind.
            options["xla_gpu_experimental_parallel_collective_overlap_limit"] = 4
        if "seq" in automatic_axes:
            # XLA would unroll the layers' loops, whose inner loops it then shares between the
            # copies, and abort ("Call graph must have been flattened").
            options["xla_gpu_enable_while_loop_unrolling"] = "WHILE_LOOP_UNROLLING_NO_UNROLL"
    gather = zero.prefetch_bucket_size if zero.stage == 3 else zero.allgather_bucket_size
    gather_bytes = gather * jnp.dtype(compute_dtype).itemsize
    reduce_bytes = zero.reduce_bucket_size * jnp.dtype(reduce_dtype or compute_dtype).itemsize
    if gather_bytes:
        options["xla_gpu_all_gather_combine_threshold_bytes"] = gather_bytes
    if reduce_bytes:
        options["xla_gpu_reduce_scatter_combine_threshold_bytes"] = reduce_bytes
        options["xla_gpu_all_reduce_combine_threshold_bytes"] = reduce_bytes
    if described:
        options["xla_gpu_enable_triton_gemm"] = False
    return options

"""The one place that knows how JAX's Pallas differs between versions.

Pallas' Triton backend is deprecated from JAX 0.11 and may go, and the backend that a `pallas_call`
without compiler parameters means has changed from version to version: so parameters are always
passed, and what is not there is found out here and nowhere else.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental import pallas as pl

# Said once by JAX at each lowering; README and docs say it too.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


triton: Any = _optional("jax.experimental.pallas.triton")
"""`jax.experimental.pallas.triton`, or None where this JAX has it no more."""

mosaic: Any = _optional("jax.experimental.pallas.mosaic_gpu")
"""`jax.experimental.pallas.mosaic_gpu`, or None where this JAX lacks it."""

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3])
TRITON_CALL = "__gpu$xla.gpu.triton"
"""The custom call that a Triton kernel is lowered to."""


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    input_output_aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """`pl.pallas_call` for Triton; with `interpret` it runs on any device, without Triton."""
    options: dict[str, Any] = {}
    if triton is not None:
        options["compiler_params"] = triton.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        )
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret,
        input_output_aliases=input_output_aliases or {},
        **options,
    )


def described_gpu(kind: str = "NVIDIA H200", cores: int = 132) -> AbstractContextManager[Any]:
    """A context in which kernels are lowered for a GPU that need not be there.

        with described_gpu():
            lowered = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))

    Args:
      kind: contains a name that JAX knows: A100, H100, H200, B200, L4.
      cores: streaming multiprocessors.
    """
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    mesh = AbstractMesh((1,), ("_",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def automatic_axes() -> dict[str, int]:
    """The axes larger than 1 of the mesh being traced under that the compiler partitions over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    manual = jax.sharding.AxisType.Manual
    return {name: n for name, n in mesh.shape.items() if n > 1 and types[name] != manual}


def shard_map(
    function: Callable[..., Any], *, in_specs: Any, out_specs: Any, axis_names: frozenset[str]
) -> Callable[..., Any]:
    """`jax.shard_map` over axes of the mesh being traced under, without the check of varying
    axes, which kernels do not know."""
    return jax.shard_map(
        function,
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axis_names,
        check_vma=False,
    )


def gpu_kind() -> str:
    """The kind of GPU that is being lowered for, such as "NVIDIA H200"; "" where there is none."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        return described.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""

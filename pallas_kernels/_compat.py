"""The one place that knows how JAX's Pallas differs between versions.

Pallas' Triton backend is deprecated from JAX 0.11 and may go, and the backend that a `pallas_call`
without compiler parameters means has changed from version to version: so parameters are always
passed, and what is not there is found out here and nowhere else.
"""

from __future__ import annotations

import dataclasses
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

mosaic: Any
"""`jax.experimental.pallas.mosaic_gpu`, or None where this JAX lacks it; imported when first asked
for, since that takes half a second."""


def __getattr__(name: str) -> Any:
    if name == "mosaic":
        globals()[name] = _optional("jax.experimental.pallas.mosaic_gpu")
        return globals()[name]
    raise AttributeError(f"module {__name__} has no attribute {name}")


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


def mosaic_interpreter() -> Any:
    """Parameters of Mosaic's interpreter. Races are errors from JAX 0.12, printed before it."""
    names = [field.name for field in dataclasses.fields(mosaic.InterpretGPUParams)]
    raising = {"on_race": "raise"} if "on_race" in names else {}
    return mosaic.InterpretGPUParams(detect_races=True, **raising)


def cuda_version() -> int | None:
    """Of the CUDA that this JAX compiles with, such as 12090 for 12.9; None without one."""
    from jax._src.lib import cuda_versions

    try:
        return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    except Exception:
        return None


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


def mesh_of(operands: Sequence[Any]) -> Any:
    """The mesh being traced under; if there is none, that of the first operand placed on one."""
    mesh = jax.sharding.get_abstract_mesh()
    for one in operands:
        if not mesh.empty:
            break
        mesh = mesh if one is None else jax.typeof(one).sharding.mesh
    return mesh


def split_axes(mesh: Any) -> dict[str, int]:
    """The axes larger than 1 of a mesh over which a program is still one: Auto, or Explicit."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    manual = jax.sharding.AxisType.Manual
    return {name: n for name, n in mesh.shape.items() if n > 1 and types[name] != manual}


def explicit_part(spec: jax.sharding.PartitionSpec, mesh: Any) -> jax.sharding.PartitionSpec:
    """What a spec says of a mesh's Explicit axes."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def explicit(entry: Any) -> Any:
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        return tuple(n for n in names if types[n] == jax.sharding.AxisType.Explicit) or None

    return jax.sharding.PartitionSpec(*map(explicit, spec))


def shard_map(
    function: Callable[..., Any], *, mesh: Any, in_specs: Sequence[Any], out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over all axes of an abstract mesh that are not manual yet, without the check
    of varying axes, which kernels do not know. The mesh need not be set, and of Explicit axes
    operands may be split otherwise: then they are brought to where they are needed."""
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(in_specs),
        out_specs=out_specs,
        axis_names=frozenset(split_axes(mesh)),
        check_vma=False,
    )
    explicit = jax.sharding.AxisType.Explicit in mesh.axis_types

    def call(*operands: Any) -> Any:
        if explicit:
            operands = tuple(
                jax.sharding.reshard(
                    one, jax.sharding.NamedSharding(mesh, explicit_part(spec, mesh))
                )
                for one, spec in zip(operands, in_specs, strict=True)
            )
        return mapped(*operands)

    if not jax.sharding.get_abstract_mesh().empty:
        return call

    def call_on_mesh(*operands: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return call(*operands)

    # The devices of an abstract mesh are those of the arguments of a `jit`.
    return jax.jit(call_on_mesh)


def platform() -> str:
    """What is being lowered for: of the mesh being traced under, or else the default device's."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if described is None else described.platform


def gpu_kind() -> str:
    """The kind of GPU that is being lowered for, such as "NVIDIA H200"; "" where there is none."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        return described.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""

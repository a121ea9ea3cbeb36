"""Kernels as compiled for a described GPU: whether registers spill, shared memory, PTX.

    kernels, compiled = compile_for("h200", f, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert "wgmma" in kernels["name"].ptx

XLA compiles down to machine code and itself says whether a kernel spills; its dumps hold the rest.
No GPU, no driver and no ptxas is needed. Mosaic kernels are compiled before XLA sees them, so of
these it says nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jspeed.planner.targets import described_devices

TENSOR_CORES = {"h200": "wgmma.mma_async", "a100-80": "mma.sync"}
"""The instruction that a GPU's tensor cores are asked with."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program.

    Attributes:
      shared_bytes: of shared memory per block.
      threads: per block.
      ptx: its module's text.
    """

    shared_bytes: int
    threads: int
    ptx: str


class SpillError(Exception):
    """Registers of a kernel spill to local memory."""


def compile_for(
    target: str, function: Callable[..., Any], *arguments: Any, spills: bool = False, **jit: Any
) -> tuple[dict[str, Kernel], Any]:
    """Compiles a function for one described GPU.

    Args:
      target: a name that `jspeed.planner.targets` knows.
      function: of the arguments.
      arguments: trees of anything with a shape and a dtype, which is all that is used of them.
      spills: whether registers may spill to local memory.
      jit: more arguments of `jax.jit`.

    Returns:
      The kernels that are custom calls, by the name given to `pallas_call`, and the executable,
      with `memory_analysis()` and `as_text()`.

    Raises:
      SpillError: a kernel spills registers and may not.
      jax.errors.JaxRuntimeError: XLA cannot compile it, such as for too much shared memory.
    """
    mesh = _mesh(target)
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding), arguments
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    ):
        lowered = jax.jit(function, **jit).trace(*shapes).lower()
        options = {
            "xla_dump_to": folder,
            "xla_dump_emitter_re": "ptx",
            "xla_gpu_fail_ptx_compilation_on_register_spilling": not spills,
        }
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "register spilling" in str(error):
                raise SpillError(str(error)) from error
            raise
        modules = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
        thunks = "".join(path.read_text() for path in Path(folder).glob("*.thunk_sequence.txt"))
    launches = re.findall(
        r"kCustomKernel .*?(\w+) grid: \[.*?\] threads: \[(\d+), (\d+), (\d+)\]\s+"
        r"shared_memory: (\d+) bytes",
        thunks,
    )
    kernels = {}
    for name, x, y, z, shared in launches:
        ptx = next((text for text in modules if re.search(rf"\.entry {name}\b", text)), "")
        kernels[name] = Kernel(int(shared), int(x) * int(y) * int(z), ptx)
    return kernels, compiled


@functools.cache
def _mesh(target: str) -> Mesh:
    return Mesh(np.array(described_devices(target, 1)), ("_",))

"""What fused kernels and XLA's own move through memory, as compiled for a described GPU.

    python -m benchmarks.kernel_traffic [--target h200]

Compiles real train steps with and without the kernels of `pallas_kernels`, adds up what every
kernel of the compiled programs reads and writes, and prints the tables of docs/kernels-adam.md and
docs/kernels-rms-norm.md. Needs the CUDA compiler plugin and no GPU: these are bytes, not times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.report import markdown_table
from jspeed.layout.mesh import resolve_mesh
from jspeed.models.gpt2.config import GPT2Config
from jspeed.models.gpt2.model import GPT2
from jspeed.models.llama.config import LlamaConfig
from jspeed.models.llama.model import Llama
from jspeed.nn import language_model_loss
from jspeed.optim.adam import Applied, adam
from jspeed.planner.targets import described_devices
from jspeed.planner.testing import compile_step
from jspeed.profile.compiled import compile_lowered
from jspeed.profile.costs import Costs
from jspeed.profile.hlo import Computation, Instruction, Module, parse_module
from jspeed.profile.trips import executions
from jspeed.training.program import make_program
from pallas_kernels.rms_norm import add_rms_norm
from pallas_kernels.rms_norm.triton import backward

_LAYOUTS = ((0, 1), (0, 8), (1, 8), (2, 8), (3, 8))
"""(stage, GPUs)."""
_MODEL = GPT2Config(
    vocab_size=50257,
    layers=12,
    hidden_size=768,
    heads=12,
    sequence_length=1024,
    intermediate_size=3072,
    attention="blockwise",
    recompute=("activation", "norm"),
    sequence_sharding=False,
)
_ACCUMULATION = 2
_TOKENS, _FEATURES = 16384, 4096


@dataclass(frozen=True)
class Traffic:
    """What one device's kernels read and write in one execution of a program.

    Attributes:
      all: bytes of all kernels, loops by their trips; collectives are left out.
      update: bytes of those kernels that read the optimizer's state or what was made of it.
      kernels: number of the latter.
    """

    all: int
    update: int
    kernels: int


def traffic(module: Module) -> Traffic:
    """The traffic of a compiled program; an update is found by its arguments, `...opt_state...`."""
    costs, total = Costs(module), 0
    for name, times in executions(module).items():
        computation = module.computations[name]
        for instruction in computation.instructions:
            total += times * _bytes(costs, computation, instruction)
    entry = module.computations[module.entry]
    touched: set[str] = set()
    update = kernels = 0
    for instruction in entry.instructions:
        of_state = instruction.opcode == "parameter" and "opt_state" in instruction.attributes
        if of_state or not touched.isdisjoint(instruction.operands):
            moved = _bytes(costs, entry, instruction)
            update, kernels = update + moved, kernels + (moved > 0)
            if not instruction.opcode.startswith("all-gather"):
                touched.add(instruction.name)
    return Traffic(total, update, kernels)


def _bytes(costs: Costs, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode in ("while", "conditional", "call"):
        return 0  # what they run is counted there
    if instruction.opcode.endswith(("-start", "-done")):
        return 0
    return costs.of(computation, instruction).bytes


def adam_rows(target: str) -> list[list[str]]:
    """One row per layout of a GPT-2 with 124M parameters in bf16, two microbatches a step."""
    program = make_program(lambda rngs: GPT2(_MODEL, rngs=rngs))
    tokens = ((1, _MODEL.sequence_length), "int32")
    batch: dict[str, tuple[tuple[int, ...], str]] = {"input_ids": tokens, "labels": tokens}
    rows = []
    for stage, devices in _LAYOUTS:
        steps = [
            compile_step(
                program,
                language_model_loss,
                batch,
                shape=resolve_mesh(devices=devices),
                stage=stage,
                accumulation=_ACCUMULATION,
                target=target,
                optimizer=_adam(applied),
            )
            for applied in ("by_the_step", "in_place")
        ]
        own = steps[0].parameters / (devices if stage else 1)
        theirs, ours = (traffic(step.module) for step in steps)
        rows.append(
            [
                str(stage),
                str(devices),
                f"{theirs.update / own:.1f}",
                f"{ours.update / own:.1f}",
                f"{theirs.kernels}",
                f"{ours.kernels}",
                f"{(ours.all - theirs.all) / own:+.1f}",
                f"{(steps[1].temporary_bytes - steps[0].temporary_bytes) / 2**20:+.1f}",
            ]
        )
    return rows


def _adam(applied: Applied) -> optax.GradientTransformation:
    return adam(1e-3, weight_decay=0.1, applied=applied)


def rms_norm_rows(target: str) -> list[list[str]]:
    """One row per pass of residual sum and normalisation, `[16384, 4096]` in bf16."""
    x = jax.ShapeDtypeStruct((_TOKENS, _FEATURES), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((_FEATURES,), jnp.float32)

    rstd = jax.ShapeDtypeStruct((_TOKENS,), jnp.float32)
    norm = functools.partial(add_rms_norm, epsilon=1e-6)

    def xla_backward(total: Any, scale: Any, d_total: Any, d_normed: Any) -> Any:
        one = functools.partial(norm, implementation="xla")
        dx, _, d_scale = jax.vjp(one, total, None, scale)[1]((d_total, d_normed))
        return dx, d_scale

    theirs = {
        "forward": (functools.partial(norm, implementation="xla"), (x, x, scale)),
        "backward": (xla_backward, (x, scale, x, x)),
    }
    ours = {
        "forward": (functools.partial(norm, implementation="triton"), (x, x, scale)),
        "backward": (functools.partial(backward, interpret=False), (x, rstd, scale, x, x)),
    }
    rows = []
    for name in theirs:
        per_element = []
        for function, shapes in (theirs[name], ours[name]):
            text = _compile(target, function, *shapes)
            per_element.append(traffic(parse_module(text)).all / (_TOKENS * _FEATURES))
        rows.append([name, *(f"{value:.2f}" for value in per_element)])
    return rows


def llama_row(target: str) -> list[str]:
    """Of a training step of Llama's blocks, per element of the residual stream and layer."""
    layers, batch, length, width = 4, 2, 2048, 2048
    moved = []
    for norm in ("xla", "kernel"):
        config = LlamaConfig(
            vocab_size=4096,
            layers=layers,
            hidden_size=width,
            heads=16,
            kv_heads=4,
            intermediate_size=5632,
            head_dim=128,
            attention="blockwise",
            recompute=("activation", "norm"),
            sequence_sharding=False,
            norm=norm,
        )
        tokens = ((batch, length), "int32")
        step = compile_step(
            make_program(functools.partial(_llama, config)),
            language_model_loss,
            {"input_ids": tokens, "labels": tokens},
            shape=resolve_mesh(devices=1),
            stage=0,
            target=target,
        )
        moved.append(traffic(step.module).all / (layers * batch * length * width))
    return ["Llama's layer, both, difference", "0", f"{moved[1] - moved[0]:+.1f}"]


def _llama(config: LlamaConfig, rngs: nnx.Rngs) -> Llama:
    return Llama(config, rngs=rngs)


def _compile(target: str, function: Callable[..., Any], *shapes: Any) -> str:
    mesh = Mesh(np.array(described_devices(target, 1)), ("_",))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=whole) for one in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return compile_lowered(jax.jit(function).lower(*placed), {"_": 1}).text


def main(
    target: Annotated[str, typer.Option(help="A GPU, as jspeed targets names it.")] = "h200",
) -> None:
    """Prints both tables as Markdown."""
    jax.config.update("jax_platforms", "cpu")  # described GPUs are compiled for, not looked for
    typer.echo(f"Compiled for {target} with JAX {jax.__version__}; bytes per element.\n")
    head = ["pass", "XLA", "kernels"]
    typer.echo(markdown_table(head, [*rms_norm_rows(target), llama_row(target)]) + "\n")
    head = [
        "stage",
        "GPUs",
        "XLA",
        "kernel",
        "XLA's kernels",
        "kernels",
        "step",
        "temporaries, MiB",
    ]
    typer.echo(markdown_table(head, adam_rows(target)))


if __name__ == "__main__":
    typer.run(main)

"""What the engine tells XLA, and what "auto" in a configuration takes from the model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jspeed.config import AutoFacts, Config
from jspeed.engine.build import RunPlan
from jspeed.layout.compiler_options import CommunicationSettings, compiler_options
from jspeed.layout.mesh import BATCH_AXES
from jspeed.layout.zero import Layout, Role
from jspeed.training.program import LossFn, Program
from jspeed.training.state import abstract_state
from jspeed.training.step import HostUpdate, make_train_step

# Where models keep their width, in the order of looking; as Hugging Face's configurations first.
_WIDTHS = (
    "hidden_size",
    "n_embd",
    "d_model",
    "embed_dim",
    "hidden_dim",
    "width",
    "dim",
    "features",
)


def auto_facts(config: Config, program: Program, mesh: Mesh) -> AutoFacts:
    """What is known of a run when its configuration's "auto" values are resolved.

    The width is the `model` section's; otherwise the model's own `config`, `cfg` or module tells it
    as `hidden_size` or one of its usual names. Of a list of widths the largest counts, as in
    Hugging Face's integration.
    """
    size = 1
    for axis in BATCH_AXES:
        size *= mesh.shape[axis]
    return AutoFacts(
        hidden_size=config.model.hidden_size if config.model else width_of(program.blueprint),
        total_steps=config.run.steps if config.run else None,
        data_parallel_size=size,
    )


def width_of(module: Any) -> int | None:
    """The width that a model names, or None."""
    for holder in (getattr(module, "config", None), getattr(module, "cfg", None), module):
        nested = getattr(holder, "text_config", None)
        for place in (holder, nested):
            for name in _WIDTHS:
                width = _width(getattr(place, name, None))
                if width is not None:
                    return width
            width = _width(getattr(place, "hidden_sizes", None))
            if width is not None:
                return width
    return None


def _width(value: Any) -> int | None:
    if isinstance(value, list | tuple) and value:
        widths = [_width(item) for item in value]
        return None if None in widths else max(width for width in widths if width is not None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def jit_step(
    config: Config, program: Program, loss_fn: LossFn, plan: RunPlan, *, described: bool = False
) -> Any:
    """The train step, jitted as the engine runs it.

    Args:
      config: resolved.
      program: the model.
      loss_fn: `(model, batch, rng)`, as for training.
      plan: of the run, on a mesh of devices.
      described: the mesh is of described GPUs, which can be compiled for but not run on.

    Returns:
      The jitted `(state, placed batch) -> (state, metrics)`, which consumes the state.
    """
    options = step_options(config, plan.layout, described=described)
    layout, rates = lowered_layout(plan.layout, described=described), plan.rates
    state = abstract_state(program, plan.optimizer, layout, plan.loss_scale)
    step = make_train_step(
        program, loss_fn, plan.optimizer, layout, plan.step, plan.schedule, rates
    )
    outputs: tuple[Any, ...] = (jax.tree.map(lambda leaf: leaf.sharding, state), None)
    if rates is not None:
        gradients = {
            path: layout.sharding(path, Role.MOMENTS)
            for path in layout.leaves
            if path in layout.on_host - layout.params_on_host
        }
        outputs += (HostUpdate(gradients, None, None, None, None),)  # pyright: ignore
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=outputs,
        compiler_options=options,
    )


def lowered_layout(layout: Layout, *, described: bool) -> Layout:
    """The layout that a step's state is lowered in.

    Shardings over described devices lose their memory kinds, and those over axes alone do not; the
    batch, over the devices, says what to compile for.
    """
    if not described or not (layout.streamed or layout.params_on_host):
        return layout
    assert isinstance(layout.mesh, Mesh)
    return replace(layout, mesh=layout.mesh.abstract_mesh)


def step_options(
    config: Config, layout: Layout, *, described: bool = False
) -> dict[str, Any] | None:
    """XLA's options for the train step on the mesh's platform; None where there are none."""
    assert isinstance(layout.mesh, Mesh), "a step is compiled for devices"
    platform = layout.mesh.devices.flat[0].platform
    options = compiler_options(
        platform,
        communication_settings(config),
        compute_dtype=layout.compute_dtype,
        reduce_dtype=layout.reduce_dtype,
        automatic_axes=layout.automatic_axes,
        devices=layout.mesh.size,
        described=described,
    )
    return dict(options) or None


def communication_settings(config: Config) -> CommunicationSettings:
    """What a configuration says of overlap and buckets."""
    zero = config.zero
    # What came from host memory in pieces, and leaves in pieces, must not wait for the others.
    most = 1 if zero.offload_param else 2**63 - 1
    return CommunicationSettings(
        stage=zero.stage,
        overlap_comm=zero.overlap_comm,
        reduce_bucket_size=min(most, zero.reduce_bucket_size),
        allgather_bucket_size=min(most, zero.allgather_bucket_size),
        prefetch_bucket_size=min(most, zero.prefetch_bucket_size),
    )


def enable_compile_cache(directory: str | os.PathLike[str] | None = None) -> Path:
    """Turns XLA's persistent compilation cache on, unless the user has set one; returns its folder.

    The default is `jspeed/xla` under `XDG_CACHE_HOME` or `~/.cache`.
    """
    current = jax.config.values["jax_compilation_cache_dir"]
    if current:
        return Path(current)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    chosen = Path(directory) if directory is not None else Path(base) / "jspeed" / "xla"
    chosen.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return chosen

"""What of a run is offloaded, by its configuration, and whether host and disk have room for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from jspeed.config import Config, OffloadOptimizerConfig, OffloadParamConfig, OptimizerConfig
from jspeed.core.errors import ConfigError
from jspeed.engine.disk_setup import PARAMETERS, SECTION, STORES, buffers_of_layers, check_disks
from jspeed.layout.disk_port import DiskPort
from jspeed.layout.zero import Layout, Role
from jspeed.offload import AdamRule, ChunkStore, FileStore, HostAdam, HostStore
from jspeed.offload.chunks import CHUNK_ELEMENTS
from jspeed.offload.needs import Need, check_host_memory

_ON_HOST = ("Adam", "AdamW", "FusedAdam")
_ELEMENTWISE = (*_ON_HOST, "Lion", "Adagrad", "SGD")


def parameters_on_host(
    config: Config, layout: Layout, optimizer: optax.GradientTransformation | None
) -> frozenset[str]:
    """The parameters whose optimizer state is offloaded.

    Args:
      config: resolved.
      layout: of the parameters.
      optimizer: that was passed in, in place of the configuration's.

    Raises:
      ConfigError: the optimizer has no update on the host.
    """
    section = config.zero.offload_optimizer
    if section is None or not layout.leaves:
        return frozenset()
    streamed = section.update == "device"
    possible = _ELEMENTWISE if streamed else _ON_HOST
    how = "in chunks" if streamed else "on the host"
    if optimizer is not None:
        raise ConfigError(
            f'"{SECTION}.device": "{section.device}" needs an optimizer of the configuration, one '
            f"of {', '.join(possible)}, whose update runs {how}; an optax optimizer that is passed "
            'in updates whole parameters on the devices. Name it under "optimizer", or remove the '
            "section."
        )
    kind = config.optimizer.type if config.optimizer else None
    if kind not in possible:
        other = (
            "" if streamed or kind not in _ELEMENTWISE else f', set "{SECTION}.update": "device"'
        )
        raise ConfigError(
            f'"{SECTION}.device": "{section.device}" does not go with "optimizer.type": "{kind}", '
            f"which has no update {how}. Use one of {', '.join(possible)}{other}, or remove the "
            "section."
        )
    sizes = {path: math.prod(layout.leaves[path].shape) for path in layout.trained}
    return _share(sizes, section)


def _share(sizes: Mapping[str, int], section: OffloadOptimizerConfig) -> frozenset[str]:
    """Parameters that make up the ratio as nearly as whole ones can, largest first."""
    if section.ratio == 1:
        return frozenset(sizes)
    left = section.ratio * sum(sizes.values())
    chosen = set()
    for path in sorted(sizes, key=lambda path: (-sizes[path], path)):
        if sizes[path] / 2 <= left:  # nearer with it than without
            chosen.add(path)
            left -= sizes[path]
    return frozenset(chosen)


def with_parameters_on_host(
    config: Config, layout: Layout, stacked: Sequence[str], accumulation: int
) -> Layout:
    """The layout with the parameters that stay in host memory, if the configuration says so.

    These are the parameters that stack layers, without those so small that ZeRO-3 would keep them
    whole.

    Args:
      config: resolved.
      layout: with parameters `on_host`.
      stacked: regexes of parameters that stack layers.
      accumulation: microbatches per step.

    Raises:
      ConfigError: what does not go with it.
    """
    section = config.zero.offload_param
    if section is None or not layout.leaves:
        return layout
    said = f'"{PARAMETERS}.device": "{section.device}"'
    optimizer = config.zero.offload_optimizer
    if optimizer is None or optimizer.ratio != 1:
        found = '"none"' if optimizer is None else f'offloaded with "ratio": {optimizer.ratio}'
        raise ConfigError(
            f"{said} needs all of the optimizer's state on the host, where the parameters are "
            f'updated, and it is {found}. Set "{SECTION}": {{"device": "cpu"}}, or "nvme".'
        )
    if layout.streamed:
        raise ConfigError(
            f'{said} does not go with "{SECTION}.update": "device": parameters on the host are '
            'updated there. Use "update": "host".'
        )
    if layout.frozen:
        raise ConfigError(
            f'{said} does not go with "trainable" yet, since parameters on the host leave their '
            'gradients there. Remove one of the two; "offload_optimizer" goes with it.'
        )
    if layout.stages > 1:
        raise ConfigError(
            f'{said} does not go with "mesh.pipe": {layout.stages}: stages of a pipeline need '
            'their layers for every microbatch in turn. Use "data" with "stage": 3 in its place.'
        )
    chosen = frozenset(
        path
        for path, leaf in layout.leaves.items()
        if not leaf.persistent and any(re.fullmatch(pattern, path) for pattern in stacked)
    )
    if not chosen:
        raise ConfigError(
            f"{said}: no parameter of this model stacks layers that are large enough to be "
            "streamed. Scan over the layers and name their parameters, as "
            'jspeed.initialize(stacked=["blocks/.*"]), or lower '
            '"zero_optimization.stage3_param_persistence_threshold".'
        )
    split = {
        path
        for path in chosen
        if layout.role_spec(path, Role.MASTER) != layout.role_spec(path, Role.MOMENTS)
    }
    if split and jax.process_count() > 1:
        raise ConfigError(
            f'{said} with {jax.process_count()} processes and "stage": {layout.stage}: each would '
            f'update its part of {min(split)} and hold all of it. Use "stage": 3.'
        )
    dtype = layout.reduce_dtype if accumulation == 1 else config.precision.grad_accum_dtype
    disk = DiskPort() if section.device == "nvme" else None
    return replace(layout, params_on_host=chosen, host_gradient_dtype=dtype, disk=disk)


def chunk_elements(config: Config) -> int:
    """The most elements of a chunk of offloaded state."""
    section = config.zero.offload_optimizer
    return CHUNK_ELEMENTS if section is None else min(section.chunk_size, CHUNK_ELEMENTS)


def adam_rule(section: OptimizerConfig) -> AdamRule:
    """Adam's constants as the configuration says them."""
    params = section.params
    return AdamRule(
        eps=params["eps"],
        weight_decay=params["weight_decay"],
        decoupled=params["adam_w_mode"],
        bias_corrected=params["bias_correction"],
    )


def make_store(
    config: Config, layout: Layout, accumulation: int, adam: HostAdam, sizes: Sequence[int]
) -> ChunkStore:
    """The store of a tier.

    Args:
      config: resolved; says which tier.
      layout: with parameters `on_host`.
      accumulation: microbatches per step.
      adam: that updates the state.
      sizes: elements of each chunk.

    Raises:
      OffloadError: host or disk has too little room, or the folder cannot be used.
    """
    section = config.zero.offload_optimizer
    assert section is not None
    _check_room(section, config.zero.offload_param, layout, accumulation, sizes)
    if section.device == "cpu":
        return HostStore(sizes, zeros=adam.zeros)
    assert section.nvme_path is not None
    return FileStore(
        section.nvme_path,
        sizes,
        buffers=section.buffer_count,
        name=f"optimizer{next(STORES)}",
        process=jax.process_index(),
    )


def _of_layers(layout: Layout) -> int:
    """Bytes of this process's parameters in host memory, and of room for their gradients."""
    itemsizes = {
        Role.MASTER: jnp.dtype(layout.compute_dtype).itemsize,
        Role.MOMENTS: jnp.dtype(layout.host_gradient_dtype).itemsize,
    }
    return _local_devices(layout) * sum(
        itemsize * layout.part_elements(path, role)
        for path in layout.params_on_host
        for role, itemsize in itemsizes.items()
    )


def check_room_to_stream(layout: Layout, tensors: int) -> None:
    """Refuses a run whose state its host cannot hold in pinned memory, before it has made anything.

    Args:
      layout: `streamed`.
      tensors: fp32, of each parameter's state.

    Raises:
      OffloadError: it does not fit.
    """
    held = sum(layout.part_elements(path, Role.MOMENTS) for path in layout.on_host)
    state = 4 * tensors * held * _local_devices(layout)
    needs = [Need("master weights and moments, pinned, for each device its part", state)]
    if jax.default_backend() == "cpu":
        needs.append(_of_cpu_devices(layout))
    check_host_memory(
        needs,
        'Train with "zero_optimization.stage" 1 or more, which shares the state out; offload less '
        'of it with "ratio"; or keep it once for each process with "update": "host".',
    )


def _of_cpu_devices(layout: Layout) -> Need:
    itemsize = jnp.dtype(layout.compute_dtype).itemsize
    held = sum(
        itemsize * layout.part_elements(path, Role.MASTER)
        for path in layout.leaves
        if path not in layout.params_on_host
    )
    total = 2 * held * _local_devices(layout)
    return Need("parameters and gradients of the CPU's own devices", total)


def _of_largest_stack(layout: Layout) -> Need:
    """A stack of layers is made, saved and loaded whole, one after the other."""
    largest = max(layout.part_elements(path, Role.MOMENTS) for path in layout.params_on_host)
    return Need(
        "the largest stack of layers, three times in fp32, while it is made, saved or loaded",
        3 * 4 * largest * _local_devices(layout),
    )


def _local_devices(layout: Layout) -> int:
    """Devices of the mesh that are this process's."""
    return len(layout.sharding(next(iter(layout.leaves)), Role.MASTER).addressable_devices)


def _check_room(
    section: OffloadOptimizerConfig,
    layers: OffloadParamConfig | None,
    layout: Layout,
    accumulation: int,
    sizes: Sequence[int],
) -> None:
    """Refuses a run that its host or disk is too small for, before it has made anything."""
    widest, state = max(sizes, default=0), 12 * sum(sizes)
    itemsize = jnp.dtype(layout.compute_dtype).itemsize
    moving = Need("chunks on their way to the devices and back", 8 * widest * itemsize)
    of_state = Need("master weights and Adam's moments", state)
    needs = [of_state, moving]
    check_disks(section, layers, layout, accumulation, of_state)
    if section.device == "nvme":
        needs = [
            Need("buffers between file and update", 12 * widest * section.buffer_count),
            moving,
        ]
    if layout.disk is not None:
        assert layers is not None
        needs += [buffers_of_layers(layers, layout, accumulation), _of_largest_stack(layout)]
    elif layout.params_on_host:
        needs.append(Need("parameters and gradients of layers", _of_layers(layout)))
    if jax.default_backend() == "cpu":
        needs.append(_of_cpu_devices(layout))
    check_host_memory(
        needs,
        'Train on more processes or hosts with "zero_optimization.stage" 1 or more, which share '
        'the state; offload less of it with "ratio"; or put it on the disk with "device": "nvme".',
    )

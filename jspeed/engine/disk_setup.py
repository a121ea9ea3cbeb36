"""What of a run is on the disk, and whether there is room for it."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax

from jspeed.config import OffloadOptimizerConfig, OffloadParamConfig
from jspeed.layout.zero import Layout
from jspeed.offload.layer_files import LayerFiles
from jspeed.offload.needs import Need, check_disk
from jspeed.offload.stack_file import buffer_bytes, file_bytes

SECTION = "zero_optimization.offload_optimizer"
PARAMETERS = "zero_optimization.offload_param"
STORES = itertools.count()
"""Numbers for stores: engines of one process may share a folder."""


def make_files(section: OffloadParamConfig, layout: Layout, accumulation: int) -> LayerFiles:
    """The files of the layers.

    Args:
      section: where.
      layout: with `params_on_host` on the disk.
      accumulation: microbatches per step.

    Raises:
      OffloadError: the disk has too little room, or the folder cannot be used.
    """
    assert section.nvme_path is not None
    return LayerFiles(
        section.nvme_path,
        layout,
        buffers=section.buffer_count,
        accumulates=accumulation > 1,
        name=f"parameters{next(STORES)}",
        process=jax.process_index(),
    )


def buffers_of_layers(section: OffloadParamConfig, layout: Layout, accumulation: int) -> Need:
    """What of the layers is in host memory while they are on the disk."""
    most = buffer_bytes(layout, section.buffer_count, accumulates=accumulation > 1)
    return Need("buffers of layers between file and devices", most)


def check_disks(
    optimizer: OffloadOptimizerConfig,
    layers: OffloadParamConfig | None,
    layout: Layout,
    accumulation: int,
    state: Need,
) -> None:
    """Compares what each disk has to hold with what is free on it.

    Args:
      optimizer: where its state is.
      layers: where the layers are.
      layout: of the parameters.
      accumulation: microbatches per step.
      state: of the optimizer.

    Raises:
      OffloadError: it is too little, or a folder cannot be used.
    """
    wanted: dict[str, tuple[Path, Need]] = {}
    if optimizer.device == "nvme":
        assert optimizer.nvme_path is not None
        wanted[f"{SECTION}.nvme_path"] = Path(optimizer.nvme_path), state
    if layout.disk is not None:
        assert layers is not None
        assert layers.nvme_path is not None
        size = file_bytes(layout, accumulates=accumulation > 1)
        need = Need("parameters and gradients of layers", size)
        wanted[f"{PARAMETERS}.nvme_path"] = Path(layers.nvme_path), need
    for key, (folder, _) in wanted.items():
        check_disk(
            [need for other, need in wanted.values() if _disk(other) == _disk(folder)],
            folder,
            "Free some, name a folder on another disk, or train on more processes, which share the "
            "state.",
            key=key,
        )


def _disk(folder: Path) -> int | None:
    """Which disk holds a folder; None for one that is not there, of which `check_disk` says so."""
    try:
        return folder.stat().st_dev
    except OSError:
        return None

"""Which cluster a command compiles for, from its options and the run file."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jspeed.cli.environment import mesh_devices
from jspeed.core.errors import ConfigError

if TYPE_CHECKING:
    from jspeed.config import Config


class ClusterAsked(NamedTuple):
    """A target's name or file, the number of devices, and how many share a host."""

    target: str
    gpus: int
    gpus_per_host: int


def cluster_asked(
    config: Config, *, gpu: str | None, gpus: int | None, gpus_per_host: int | None
) -> ClusterAsked:
    """What options say wins over the run file's `cluster` section; its mesh tells a number of GPUs
    that neither names.

    Raises:
      ConfigError: nothing names the GPU or their number.
    """
    section = config.cluster
    target = gpu or section.gpu
    if target is None:
        raise ConfigError(
            '"cluster.gpu": missing. Say what to compile for with --gpu h200 or with "cluster": '
            '{"gpu": "h200"} in the run file; `jspeed targets` lists what is known.'
        )
    count = gpus or section.gpus or mesh_devices(config)
    if count is None:
        raise ConfigError(
            '"cluster.gpus": missing, and "mesh.data" takes all devices there are. Say how many '
            'with --gpus 8 or with "cluster": {"gpus": 8}.'
        )
    return ClusterAsked(target, count, gpus_per_host or section.gpus_per_host)

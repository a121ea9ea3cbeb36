"""What `elasticity` chooses for a configuration: DeepSpeed's `compute_elastic_config`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jspeed.config.config import Config
from jspeed.config.elastic_batch import SECTION, choose
from jspeed.config.load import load_config
from jspeed.config.problem import Problem, config_error


@dataclass(frozen=True, slots=True)
class ElasticPlan:
    """The batch size of an elastic run.

    Attributes:
        train_batch_size: rows of one optimizer step, the same on any number of devices.
        gpu_counts: the numbers of devices that the run can have, ascending.
        micro_batch_size: rows of one device at a time; None unless a number of devices was asked
            for.
        accumulation: microbatches of one step; None as well.
    """

    train_batch_size: int
    gpu_counts: tuple[int, ...]
    micro_batch_size: int | None = None
    accumulation: int | None = None


def compute_elastic_config(
    config: Config | str | os.PathLike[str] | Mapping[str, Any], world_size: int | None = None
) -> ElasticPlan:
    """Return the batch size that `elasticity` chooses, and the numbers of devices it holds on.

    >>> section = {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1, 2]}
    >>> compute_elastic_config({"elasticity": section}, world_size=4)
    ElasticPlan(train_batch_size=8, gpu_counts=(1, 2, 4, 8), micro_batch_size=2, accumulation=1)

    DeepSpeed's function of this name returns a tuple, and for version 0.2 needs the number of
    devices; both versions tell all here without it.

    Args:
        config: a configuration, or what `load_config` takes.
        world_size: devices in all, those that share a copy of the model included.

    Raises:
        ConfigError: the configuration is not valid, `elasticity` is off or impossible, or so many
            devices do not share the batch evenly; the text names the numbers that do.
    """
    loaded = config if isinstance(config, Config) else load_config(config)
    if loaded.elasticity is None:
        text = f'it is off. Set "{SECTION}.enabled": true to have a batch size chosen.'
        raise config_error([Problem(SECTION, text)])
    batch = choose(loaded.elasticity)
    if isinstance(batch, Problem):
        raise config_error([batch])
    if world_size is None:
        return ElasticPlan(batch.train_batch_size, batch.gpu_counts)
    copies, rest = divmod(world_size, batch.model_parallel_size)
    micro = batch.unfit(world_size) if rest else batch.micro_batch_size(copies)
    if isinstance(micro, Problem):
        raise config_error([micro])
    accumulation = batch.train_batch_size // (micro * copies)
    return ElasticPlan(batch.train_batch_size, batch.gpu_counts, micro, accumulation)

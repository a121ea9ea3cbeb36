"""Which layers each pipeline stage gets, as a configuration asks for it."""

from __future__ import annotations

import math
import re
from typing import Any

from jspeed.config import Config
from jspeed.core.tree import named_leaves
from jspeed.layout.stages import StageOrder
from jspeed.layout.zero import stacked_layers
from jspeed.pipeline.partition import partition_layers
from jspeed.training.program import Program


def stage_order(config: Config, program: Program, params: Any, stages: int) -> StageOrder | None:
    """The layers of each stage and chunk; None without a pipeline.

    Args:
      config: whose `pipeline` section counts.
      program: the model.
      params: its parameters, or their shapes.
      stages: of the pipeline.

    Raises:
      ConfigError: more stages than layers, or no such partition.
      LayoutError: the model has no stack of layers.
    """
    if stages == 1:
        return None
    layers, chunks = stacked_layers(params, program.stacked), config.pipeline.chunks
    method = config.pipeline.partition
    boundaries = partition_layers(
        "uniform" if method == "best" else method,
        names=["layer"] * layers,
        parameters=_weights(program, params, layers),
        stages=stages,
        chunks=chunks,
    )
    return StageOrder.between(stages, boundaries)


def _weights(program: Program, params: Any, layers: int) -> list[int]:
    """Elements of each layer. What stands before the layers goes with the first one, and what
    follows with the last; which is which nobody knows here, so half of it each."""
    per_layer = others = 0
    for path, leaf in named_leaves(params):
        size = math.prod(leaf.shape)
        if any(re.fullmatch(pattern, path) for pattern in program.stacked):
            per_layer += size // layers
        else:
            others += size
    weights = [per_layer] * layers
    weights[0] += others // 2
    weights[-1] += others - others // 2
    return weights

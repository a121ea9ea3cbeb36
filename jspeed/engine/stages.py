"""Which layers each pipeline stage gets, as a configuration asks for it."""

from __future__ import annotations

import math
import re
from typing import Any

from jspeed.config import Config
from jspeed.core.errors import ModelError
from jspeed.core.tree import named_leaves
from jspeed.layout.placing import stacked_layers
from jspeed.layout.stages import StageOrder
from jspeed.pipeline.module import LayerList, LayerSpec
from jspeed.pipeline.partition import partition_layers
from jspeed.training.program import Program

_BEST = "best"


def stage_order(config: Config, program: Program, params: Any, stages: int) -> StageOrder | None:
    """The layers of each stage and chunk; None without a pipeline.

    Args:
      config: whose `pipeline` section counts.
      program: the model.
      params: its parameters, or their shapes.
      stages: of the pipeline.

    Raises:
      ConfigError: more stages than layers, or no such partition.
      LayoutError, ModelError: the model has no stack of layers.
    """
    if stages == 1:
        return None
    blueprint = program.blueprint
    if isinstance(blueprint, LayerList) and blueprint.stack is None:
        raise ModelError(
            '"mesh.pipe": stages share out the longest run of equal layers of a PipelineModule, '
            "and no two neighbours of this one are equal. Give them the same class and arguments: "
            "[LayerSpec(Block, 512) for _ in range(8)]."
        )
    if isinstance(blueprint, LayerList):
        _check_runs(blueprint)
    layers, method = stacked_layers(params, program.stacked), config.pipeline.partition
    elements = {path: math.prod(leaf.shape) for path, leaf in named_leaves(params)}
    if isinstance(blueprint, LayerList):
        names, sizes = blueprint.parts(elements)
        best = blueprint.partition_method
    else:
        names, sizes = ["layer"] * layers, _sizes(program, elements, layers)
        best = "uniform"
    boundaries = partition_layers(
        best if method == _BEST else method,
        names=names,
        parameters=sizes,
        stages=stages,
        chunks=config.pipeline.chunks,
    )
    return StageOrder.between(stages, boundaries)


def _check_runs(model: LayerList) -> None:
    """Refuses a list in which stages could share out a part of the layers alone."""
    start, end = model.span
    run = 1
    for number in range(1, len(model.steps)):
        layer, before = model.steps[number], model.steps[number - 1]
        same = isinstance(layer, LayerSpec) and layer.same_as(before)
        run = run + 1 if same and not start <= number < end else 1
        if 2 * run > end - start:
            raise ModelError(
                f'"mesh.pipe": stages share out layers {start} to {end - 1} of this '
                f"PipelineModule, the longest run of equal ones, but {run} equal layers stand "
                "outside of it (up to "
                f"number {number}, {layer.name}), which one stage would compute alone. Make the "
                "layers equal, or one class that holds both kinds."
            )


def _sizes(program: Program, elements: dict[str, int], layers: int) -> list[int]:
    """Elements of each layer. What stands before the layers goes with the first one, and what
    follows with the last; which is which nobody knows here, so half of it each."""
    stacked = sum(
        size
        for path, size in elements.items()
        if any(re.fullmatch(pattern, path) for pattern in program.stacked)
    )
    sizes = [stacked // layers] * layers
    others = sum(elements.values()) - stacked
    sizes[0] += others // 2
    sizes[-1] += others - others // 2
    return sizes

"""The weights of a Hugging Face folder in the place of random ones, on any layout."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from jspeed.checkpoint import Deferred
from jspeed.core.tree import named_leaves
from jspeed.engine.accessors import Accessors
from jspeed.engine.checkpoints import names_on_host, rebuild
from jspeed.engine.saved_state import saved_arrays, shapes_in_model_order
from jspeed.hf import Folder, Weights, load_parameter
from jspeed.models import ModelFactory
from jspeed.training.program import Program
from jspeed.training.state import abstract_parameters

_PARAMETERS = ("master",)


@contextmanager
def pretrained_weights(factory: ModelFactory | None, program: Program) -> Iterator[Weights | None]:
    """The weights that a model starts from, checked against its parameters before there are any.

    Args:
      factory: of the model; None where it does not start from a folder.
      program: the same model.

    Raises:
      CheckpointError: the folder does not hold the model's weights.
    """
    if factory is None or factory.hf is None or not factory.read_weights:
        yield None
        return
    shapes = {path: leaf.shape for path, leaf in named_leaves(abstract_parameters(program)[0])}
    with Folder(factory.hf) as folder:
        yield Weights(folder, factory.family, shapes)


def load_weights(engine: Accessors, weights: Weights) -> None:
    """Puts weights in the place of an engine's parameters, each device's part read for it alone.

    A random parameter is given up before its successor is read, so that both are never held.
    """
    layout = engine.layout
    shapes = engine.abstract_whole_state()
    on_host = set(names_on_host(shapes, layout))
    current = dict(named_leaves(engine.state.master))
    loaded = {}
    for name, like in saved_arrays(shapes_in_model_order(shapes, layout), _PARAMETERS).items():
        path = name.partition("/")[2]
        load = functools.partial(load_parameter, weights, path, like)
        if name in on_host:
            loaded[name] = Deferred(like.shape, like.dtype, like.sharding, load)
        else:
            current[path].delete()
            loaded[name] = load().astype(layout.stored_dtype(path))
    state = rebuild(engine.whole_state(host=False), shapes, loaded, layout, schedule=True)
    engine.take_state(state)

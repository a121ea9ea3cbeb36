"""What of an engine goes into a checkpoint, and how it comes back on another layout.

Stored are global logical arrays under stable names: `master/...`, `opt_state/...`, `mutable/...`,
`loss_scale/...`, `step`, `updates` and `rng`. Copies in the compute dtype are made anew from the
master, so neither mesh, ZeRO stage nor precision is part of the format.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jspeed.checkpoint import CheckpointStore, made
from jspeed.checkpoint.processes import of_all_processes, of_first_process
from jspeed.config.hf_model import CONFIG_NAME
from jspeed.core.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    MissingExtraError,
)
from jspeed.core.tree import map_named
from jspeed.engine.accessors import Accessors
from jspeed.engine.counters import Counters
from jspeed.engine.reporting import LOGGER
from jspeed.engine.saved_state import (
    LAYERED,
    SAVED,
    as_stored,
    is_key,
    key_shape,
    layers_in_model_order,
    saved_arrays,
    shapes_in_model_order,
)
from jspeed.layout.zero import Layout, Role
from jspeed.models import ModelFactory, hf_document
from jspeed.training.state import (
    TrainState,
    updated_by_step,
)
from jspeed.training.step import publish

_COUNTERS = ("step", "updates", "rng")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as an engine takes it.

    Attributes:
      state: the whole new state.
      counters: the counts to go on from.
      tag: of the checkpoint.
      client_state: saved with it.
    """

    state: TrainState
    counters: Counters
    tag: str
    client_state: dict[str, Any]


class EngineCheckpoints:
    """A checkpoint directory as an engine uses it."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)
        self.store = CheckpointStore(directory)

    def wait(self) -> None:
        self.store.wait()

    def save(
        self,
        engine: Accessors,
        tag: str | None,
        client_state: dict[str, Any],
        save_latest: bool,
        files: dict[str, bytes],
        wait: bool,
    ) -> str:
        tag = tag or f"global_step{engine.global_steps}"
        _check_same_tag(tag, engine.config.checkpoint.tag_validation)
        state = layers_in_model_order(engine.whole_state(), engine.layout)
        arrays = {
            path: jax.random.key_data(leaf) if is_key(leaf) else leaf
            for path, leaf in saved_arrays(state).items()
        }
        if not wait and not _on_disk(engine):
            arrays = {path: made(leaf) for path, leaf in arrays.items()}  # while training goes on
        model = engine.model_factory
        if model is not None:
            files = {**described(model), **files}
        metadata = {
            "step": engine.global_steps,
            "counters": engine.counters().to_json(),
            "client_state": client_state,
            "config": engine.config.to_dict(),
            "saved_by": {
                "mesh": engine.layout.sizes,
                "zero_stage": engine.layout.stage,
                "compute_dtype": engine.layout.compute_dtype,
            },
        }
        self.store.save(tag, arrays, metadata, files, wait=wait, update_latest=save_latest)
        return tag

    def load(
        self, engine: Accessors, tag: str | None, *, optimizer: bool, schedule: bool, counters: bool
    ) -> Loaded:
        """What the engine's state becomes; the engine itself is left as it is.

        Without a tag it is the latest checkpoint or, where that is damaged, the newest whole one.
        """

        load = functools.partial(
            self._load, engine, optimizer=optimizer, schedule=schedule, counters=counters
        )
        if tag is not None:
            return load(tag)
        latest, problem = _attempt(self.store.latest)
        if problem is None:
            loaded, problem = _attempt(lambda: load(latest))
            if loaded is not None:
                return loaded
        # What the first process sees: all have to try the same.
        tags = json.loads(of_first_process(json.dumps(self.store.tags()[::-1])))
        return _first_whole(load, [name for name in tags if name != latest], problem)

    def _load(
        self, engine: Accessors, tag: str | None, *, optimizer: bool, schedule: bool, counters: bool
    ) -> Loaded:
        metadata = self.store.metadata(tag)
        if "client_state" not in metadata:
            raise CheckpointError(
                f'Checkpoint "{tag}" in "{self.directory}" was not saved by an engine: it lacks '
                '"client_state". Read it with jspeed.checkpoint.CheckpointStore.'
            )
        found = self.store.describe(tag)
        parts = ["master", "mutable"]
        if counters:
            parts += _COUNTERS
        if optimizer:
            parts.append("opt_state")
            if any(name.startswith("loss_scale/") for name in found):
                parts.append("loss_scale")
        shapes = engine.abstract_whole_state()
        like = {
            path: key_shape(leaf) if is_key(leaf) else leaf
            for path, leaf in saved_arrays(
                shapes_in_model_order(shapes, engine.layout), tuple(parts)
            ).items()
        }
        deferred = names_on_host(shapes, engine.layout)
        restored = self.store.restore(tag, like=like, subset=True, deferred=deferred)
        _check_same_model(engine, found, restored, tag, self.directory, optimizer)
        current = engine.whole_state(host=False)
        state = rebuild(current, shapes, restored, engine.layout, schedule)
        if optimizer != schedule:
            opt_state = _with_schedules_at(state.updates, state.opt_state)
            state = replace(state, opt_state=opt_state)
        counts = engine.counters()
        if counters:
            counts = _counters(engine, metadata, restored, int(state.updates))
        return Loaded(
            state=state,
            counters=counts,
            tag=metadata.get("tag", tag or ""),
            client_state=metadata["client_state"],
        )


T = TypeVar("T")


def _attempt(action: Callable[[], T]) -> tuple[T | None, DamagedCheckpointError | None]:
    """What an action gives, or the damage that it meets; damage that one process of a run meets
    counts for all."""
    result, problem = None, None
    try:
        result = action()
    except DamagedCheckpointError as error:
        problem = error
    damaged = of_all_processes(int(problem is not None))
    if any(damaged) and problem is None:
        problem = DamagedCheckpointError(f"Process {damaged.index(1)} cannot read a checkpoint.")
    return (result, None) if problem is None else (None, problem)


def _first_whole(
    load: Callable[[str], Loaded], tags: Sequence[str], damage: DamagedCheckpointError | None
) -> Loaded:
    """The first checkpoint that is whole, in place of one that is damaged.

    Raises:
      DamagedCheckpointError: none is.
    """
    assert damage is not None, "nothing is damaged"
    problem = damage
    for tag in tags:
        if jax.process_index() == 0:
            LOGGER.warning('%s\nTaking the one before it: "%s".', problem, tag)
        loaded, again = _attempt(functools.partial(load, tag))
        if loaded is not None:
            return loaded
        assert again is not None, "it is neither whole nor damaged"
        problem = again
    raise damage


def described(model: ModelFactory) -> dict[str, bytes]:
    """What lets a checkpoint be written as a Hugging Face model: its config.json, if it can be."""
    try:
        document = hf_document(model)
    except ConfigError:
        return {}
    if model.hf is not None:  # Hugging Face's own key for where a model came from
        document["_name_or_path"] = str(Path(model.hf).expanduser().absolute())
    return {CONFIG_NAME: json.dumps(document, indent=2).encode()}


def _on_disk(engine: Accessors) -> bool:
    """Whether the state may be larger than the host's memory."""
    section = engine.config.zero.offload_optimizer
    return section is not None and section.device == "nvme"


def names_on_host(state: TrainState, layout: Layout) -> list[str]:
    """Names of what the host has of a whole state."""
    return [
        name
        for name, leaf in saved_arrays(state, LAYERED).items()
        if layout.owner(name, leaf.shape) in layout.on_host
    ]


def _counters(
    engine: Accessors, metadata: dict[str, Any], restored: dict[str, jax.Array], updates: int
) -> Counters:
    """The counts to go on from; what the checkpoint's run has skipped stays skipped."""
    saved = Counters.from_checkpoint(
        metadata,
        rows=engine.train_batch_size(),
        accumulation=engine.gradient_accumulation_steps(),
    )
    return replace(saved, unscheduled=saved.unscheduled + int(restored["updates"]) - updates)


def _check_same_model(
    engine: Accessors,
    found: dict[str, Any],
    restored: dict[str, Any],
    tag: str | None,
    directory: str,
    optimizer: bool,
) -> None:
    """A checkpoint with more parameters than the model has is another model's."""
    prefixes = ("master/", "opt_state/") if optimizer else ("master/",)
    frozen = engine.layout.frozen  # what a run that trained them knew is of no use
    extra = [
        path
        for path, leaf in found.items()
        if path.startswith(prefixes)
        and path not in restored
        and engine.layout.owner(path, leaf[0]) not in frozen
    ]
    if extra:
        shown = ", ".join(extra[:10]) + (f" and {len(extra) - 10} more" if len(extra) > 10 else "")
        raise CheckpointError(
            f'Checkpoint "{tag}" in "{directory}" holds what this run does not have: {shown}. '
            "Use the model and optimizer it was saved with, or load_module_only=True."
        )


def rebuild(
    state: TrainState,
    shapes: TrainState,
    restored: dict[str, jax.Array],
    layout: Layout,
    schedule: bool,
) -> TrainState:
    """The state with restored leaves in place, and copies made from the restored master."""

    restored = as_stored(restored, shapes, layout)

    def pick(part: str) -> Any:
        def leaf(path: str, current: Any, shape: Any) -> Any:
            name = f"{part}/{path}" if path else part
            if name not in restored:
                return current
            value = restored[name]
            return jax.random.wrap_key_data(value) if is_key(shape) else value

        return map_named(leaf, getattr(state, part), getattr(shapes, part))

    new = {part: pick(part) for part in SAVED}
    if not schedule:
        new["updates"] = state.updates
    shardings = {p: layout.sharding(p, Role.PARAM) for p in layout.leaves if layout.has_copy(p)}
    copies = jax.jit(lambda master: _copies(master, layout), out_shardings=shardings)(
        updated_by_step(new["master"], layout)
    )
    return TrainState(copies=copies, **new)


def _with_schedules_at(updates: jax.Array, opt_state: Any) -> Any:
    """The state of an optax optimizer with its schedules at a position.

    The counts beside moments, which correct their bias, stay. jspeed's own optimizers have only
    those; their schedules follow the step's own `updates`.
    """

    def moved(node: Any) -> Any:
        # Copies: the step consumes its arrays, so none may appear twice in a state.
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=jnp.copy(updates))
        if isinstance(node, optax.InjectStatefulHyperparamsState):
            states = jax.tree.map(
                lambda leaf: jnp.copy(updates) if _is_count(leaf) else leaf, node.hyperparams_states
            )
            inner = _with_schedules_at(updates, node.inner_state)
            return node._replace(hyperparams_states=states, inner_state=inner)
        return node

    kinds = (optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState)
    return jax.tree.map(moved, opt_state, is_leaf=lambda node: isinstance(node, kinds))


def _is_count(leaf: Any) -> bool:
    return leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)


def _copies(master: Any, layout: Layout) -> dict[str, jax.Array]:
    at_moments = map_named(
        lambda path, leaf: jax.lax.with_sharding_constraint(
            leaf, layout.sharding(path, Role.MOMENTS)
        ),
        master,
    )
    return publish(at_moments, layout)[1]


def _check_same_tag(tag: str, validation: str) -> None:
    """All processes must save under one tag (`checkpoint.tag_validation`)."""
    if jax.process_count() == 1 or validation == "Ignore":
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(tag.encode()).digest()[:8], np.uint32)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    if (digests == digests[0]).all():
        return
    text = f'processes save under different tags; process {jax.process_index()} says "{tag}".'
    if validation == "Fail":
        raise CheckpointError(f"save_checkpoint: {text} Pass the same tag everywhere.")
    LOGGER.warning("save_checkpoint: %s The first process decides.", text)


def save_16bit(engine: Accessors, directory: str | os.PathLike[str], filename: str) -> str:
    """See `Engine.save_16bit_model`."""
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise MissingExtraError(
            'save_16bit_model needs safetensors: pip install "jspeed[hf]"'
        ) from error
    dtype = jnp.dtype("float16" if engine.fp16_enabled() else "bfloat16")
    arrays = {path: whole.astype(dtype) for path, whole in engine.whole_parameters()}
    target = Path(directory) / filename
    if jax.process_index() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, os.fspath(target))
    return os.fspath(target)

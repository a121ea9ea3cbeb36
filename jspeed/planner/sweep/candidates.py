"""The layouts that a sweep tries: mesh axes x ZeRO stage x microbatch x remat x schedule, for one
batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.config import Config, load_config, resolve_batch
from jspeed.config.problem import config_error
from jspeed.core.errors import ConfigError, JspeedError
from jspeed.engine.build import mesh_shape
from jspeed.layout.logical import undividable
from jspeed.layout.mesh import MeshShape
from jspeed.pipeline.partition import require_layers
from jspeed.pipeline.schedules import INTERLEAVED, KINDS, check_schedule
from jspeed.planner.run_file import RunFile
from jspeed.planner.sweep.sizes import (
    axis_sizes,
    micro_batch_sizes,
    sequence_length,
    uncut_by_tensor,
    varies,
    varies_pipe,
)


@dataclass(frozen=True, order=True)
class Candidate:
    """One layout of a run; what it does not name stays as in the run file.

    Attributes:
      replica, data, tensor: sizes of the mesh axes.
      stage: of ZeRO.
      micro_batch_size: rows of one device at a time.
      accumulation: microbatches of one step, so that the global batch stays.
      remat: `model.remat`.
      pipe, seq: sizes of the other mesh axes.
      schedule: `pipeline.schedule`; empty without a pipeline.
      chunks: `pipeline.chunks`.
    """

    replica: int
    data: int
    tensor: int
    stage: int
    micro_batch_size: int
    accumulation: int
    remat: str
    pipe: int = 1
    seq: int = 1
    schedule: str = ""
    chunks: int = 1

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(
            pipe=self.pipe, replica=self.replica, data=self.data, seq=self.seq, tensor=self.tensor
        )

    @property
    def schedule_text(self) -> str:
        """The schedule with its chunks; empty without a pipeline."""
        return f"{self.schedule} of {self.chunks} chunks" if self.chunks > 1 else self.schedule

    @property
    def label(self) -> str:
        remat = "" if self.remat == "none" else f", remat {self.remat}"
        schedule = f", {self.schedule_text}" if self.schedule else ""
        return (
            f"{self.mesh}, stage {self.stage}, microbatch {self.micro_batch_size} x "
            f"{self.accumulation}{remat}{schedule}"
        )

    def changes(self) -> dict[str, Any]:
        """What it changes in a run file, as `RunFile.changed` takes it."""
        pipelined = self.pipe > 1
        return {
            "train_batch_size": self.replica
            * self.data
            * self.micro_batch_size
            * self.accumulation,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": None,
            "elasticity.enabled": None,  # it says its own sizes
            "zero_optimization.stage": self.stage,
            "zero_optimization.mics_shard_size": None,
            "mesh.pipe": self.pipe if pipelined else None,
            "mesh.replica": self.replica,
            "mesh.data": self.data,
            "mesh.seq": self.seq if self.seq > 1 else None,
            "mesh.tensor": self.tensor,
            "pipeline.stages": None,
            "pipeline.schedule": self.schedule if pipelined else None,
            "pipeline.chunks": self.chunks if pipelined else None,
            "model.remat": self.remat,
            # DeepSpeed's way to say the same.
            "activation_checkpointing.cpu_checkpointing": None,
            "activation_checkpointing.number_checkpoints": None,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "mesh": {
                "pipe": self.pipe,
                "replica": self.replica,
                "data": self.data,
                "seq": self.seq,
                "tensor": self.tensor,
            },
            "stage": self.stage,
            "micro_batch_size": self.micro_batch_size,
            "accumulation": self.accumulation,
            "remat": self.remat,
            "schedule": self.schedule or None,
            "chunks": self.chunks,
        }


@dataclass(frozen=True)
class Discarded:
    """A combination that is no layout of this run, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Enumeration:
    """What there is to try.

    Attributes:
      candidates: each with its configuration.
      discarded: what is not tried.
      train_batch_size: rows of one step, the same for all.
    """

    candidates: tuple[tuple[Candidate, Config], ...]
    discarded: tuple[Discarded, ...]
    train_batch_size: int


def enumerate_candidates(run: RunFile, *, gpus: int, gpus_per_host: int) -> Enumeration:
    """Every layout of a run on a number of devices that its `sweep` section asks for.

    Args:
      run: with a `model` section.
      gpus: in all.
      gpus_per_host: as many share a host.

    Raises:
      ConfigError: no `model` section, no global batch, or keys that training refuses.
    """
    config = run.config
    if config.model is None:
        raise ConfigError(
            '"model": missing. A sweep compiles the model of a run file; add a "model" section.'
        )
    later = config.switched_on_later()
    if later:  # what is found could not be trained
        raise config_error(list(later))
    train = _global_batch(config, gpus)
    meshes, discarded = _meshes(config, gpus, gpus_per_host)
    candidates: list[tuple[Candidate, Config]] = []
    seen = {dataclasses.replace(mesh, data=1): mesh.data for mesh in meshes if mesh.replica == 1}
    for mesh, stage in itertools.product(meshes, dict.fromkeys(config.sweep.stages)):
        shards = mesh.replica * mesh.data
        alike = dataclasses.replace(mesh, replica=1, data=1)
        if stage == 0 and mesh.replica > 1 and seen.get(alike) == shards:
            reason = f"stage 0 shards nothing, so this is data {shards} without replica"
            discarded.append(Discarded(f"{mesh}, stage 0", reason))
            continue
        for found in _of_layout(run, mesh, stage, train):
            if isinstance(found, Discarded):
                discarded.append(found)
            else:
                candidates.append(found)
    return Enumeration(tuple(candidates), tuple(discarded), train)


def _of_layout(
    run: RunFile, mesh: MeshShape, stage: int, train: int
) -> Iterator[tuple[Candidate, Config] | Discarded]:
    """Every microbatch and remat on one mesh with one ZeRO stage."""
    label, shards = f"{mesh}, stage {stage}", mesh.replica * mesh.data
    rows, rest = divmod(train, shards)
    if rest:
        reason = f'"train_batch_size" {train} is not divisible by {shards} data-parallel shards'
        yield Discarded(label, reason)
        return
    sweep = run.config.sweep
    for micro in micro_batch_sizes(sweep, rows):
        accumulation, rest = divmod(rows, micro)
        if rest:
            yield Discarded(f"{label}, microbatch {micro}", _triangle(train, micro, shards))
            continue
        schedules = list(_schedules(run.config, mesh.pipe))
        for remat, (schedule, chunks) in itertools.product(dict.fromkeys(sweep.remat), schedules):
            candidate = Candidate(
                replica=mesh.replica,
                data=mesh.data,
                tensor=mesh.tensor,
                stage=stage,
                micro_batch_size=micro,
                accumulation=accumulation,
                remat=remat,
                pipe=mesh.pipe,
                seq=mesh.seq,
                schedule=schedule,
                chunks=chunks,
            )
            yield _loaded(run, candidate)


def _loaded(run: RunFile, candidate: Candidate) -> tuple[Candidate, Config] | Discarded:
    """A candidate with its configuration; a combination that breaks a rule is none."""
    try:
        config = load_config(run.changed(candidate.changes()))
        assert config.model is not None
        if candidate.schedule:
            require_layers(config.model.layers, stages=candidate.pipe, chunks=candidate.chunks)
            check_schedule(
                candidate.schedule,
                stages=candidate.pipe,
                microbatches=candidate.accumulation,
                chunks=candidate.chunks,
            )
        return candidate, config
    except ConfigError as error:
        return Discarded(candidate.label, str(error))


def _triangle(train: int, micro: int, shards: int) -> str:
    return (
        f'"train_batch_size" {train} is not divisible by microbatch {micro} x {shards} '
        f"data-parallel shards = {micro * shards}"
    )


def _global_batch(config: Config, gpus: int) -> int:
    given = config.batch.train_batch_size
    if given is not None:
        return given
    try:
        shape = mesh_shape(config, gpus)
        return resolve_batch(config, shape.batch_shards).train_batch_size
    except JspeedError as error:
        raise ConfigError(
            '"train_batch_size": missing, and it cannot be told from the run\'s own mesh on '
            f"{gpus} devices ({error}) A sweep keeps the global batch; set it."
        ) from None


def _meshes(
    config: Config, gpus: int, gpus_per_host: int
) -> tuple[list[MeshShape], list[Discarded]]:
    """The meshes of `gpus` devices that the axes allow; `data` takes what remains."""
    mesh, sweep = config.mesh, config.sweep
    sizes = axis_sizes(config, gpus, gpus_per_host)
    found: list[MeshShape] = []
    discarded: list[Discarded] = []
    for chosen in itertools.product(*sizes.values()):
        shape = MeshShape(**dict(zip(sizes, chosen, strict=True)))
        data = gpus // shape.devices
        reason = _no_mesh(config, shape, gpus)
        if not reason and not varies(sweep, "data") and mesh.data not in (-1, data):
            reason = f'data would be {data}, but "sweep.axes" keeps it at {mesh.data}'
        if reason:
            named = {"replica": shape.replica, "tensor": shape.tensor}
            named |= {axis: size for axis, size in (("pipe", shape.pipe), ("seq", shape.seq))
                      if size > 1}  # fmt: skip
            label = " x ".join(f"{axis} {named[axis]}" for axis in sizes if axis in named)
            discarded.append(Discarded(label, reason))
        else:
            found.append(dataclasses.replace(shape, data=data))
    return found, discarded


def _no_mesh(config: Config, shape: MeshShape, gpus: int) -> str:
    """Why axes other than `data` do not go with the model and the devices; empty if they do."""
    assert config.model is not None
    if gpus % shape.devices:
        return f"{shape.devices} does not divide {gpus} devices"
    if shape.pipe > config.model.layers:
        return f"{shape.pipe} stages are more than the model's {config.model.layers} layers"
    length = sequence_length(config)
    if length % shape.seq:
        return f'"mesh.seq": {shape.seq} does not divide sequences of {length} tokens'
    return undividable(uncut_by_tensor(config), shape.tensor)


def _schedules(config: Config, stages: int) -> Iterator[tuple[str, int]]:
    """The schedules to try over so many stages, each with its chunks; `("", 1)` for one stage."""
    sweep, own = config.sweep, config.pipeline
    if stages == 1:
        yield "", 1
        return
    kinds: Sequence[str] = sweep.schedules or (own.schedule,)
    if sweep.schedules is None and varies_pipe(sweep):
        kinds = KINDS
    for kind in dict.fromkeys(kinds):
        if kind != INTERLEAVED:
            yield kind, 1
            continue
        for chunks in sorted(set(sweep.chunks or (max(2, own.chunks),))):
            yield kind, chunks

"""The layouts that a sweep tries: mesh axes x ZeRO stage x microbatch x remat, for one batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.config import Config, SweepConfig, load_config, resolve_batch
from jspeed.config.problem import config_error
from jspeed.core.errors import ConfigError, JspeedError
from jspeed.engine.build import mesh_shape
from jspeed.layout.logical import undividable
from jspeed.layout.mesh import MeshShape
from jspeed.planner.run_file import RunFile


@dataclass(frozen=True, order=True)
class Candidate:
    """One layout of a run; what it does not name stays as in the run file.

    Attributes:
      replica, data, tensor: sizes of the mesh axes.
      stage: of ZeRO.
      micro_batch_size: rows of one device at a time.
      accumulation: microbatches of one step, so that the global batch stays.
      remat: `model.remat`.
    """

    replica: int
    data: int
    tensor: int
    stage: int
    micro_batch_size: int
    accumulation: int
    remat: str

    @property
    def label(self) -> str:
        mesh = MeshShape(replica=self.replica, data=self.data, tensor=self.tensor)
        remat = "" if self.remat == "none" else f", remat {self.remat}"
        return (
            f"{mesh}, stage {self.stage}, microbatch {self.micro_batch_size} x "
            f"{self.accumulation}{remat}"
        )

    def changes(self) -> dict[str, Any]:
        """What it changes in a run file, as `RunFile.changed` takes it."""
        return {
            "train_batch_size": self.replica
            * self.data
            * self.micro_batch_size
            * self.accumulation,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": None,
            "zero_optimization.stage": self.stage,
            "zero_optimization.mics_shard_size": None,
            "mesh.replica": self.replica,
            "mesh.data": self.data,
            "mesh.tensor": self.tensor,
            "model.remat": self.remat,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "mesh": {"replica": self.replica, "data": self.data, "tensor": self.tensor},
            "stage": self.stage,
            "micro_batch_size": self.micro_batch_size,
            "accumulation": self.accumulation,
            "remat": self.remat,
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
    seen = {(mesh.data, mesh.tensor) for mesh in meshes if mesh.replica == 1}
    for mesh, stage in itertools.product(meshes, dict.fromkeys(config.sweep.stages)):
        shards = mesh.replica * mesh.data
        if stage == 0 and mesh.replica > 1 and (shards, mesh.tensor) in seen:
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
        for remat in dict.fromkeys(sweep.remat):
            yield _loaded(
                run,
                Candidate(mesh.replica, mesh.data, mesh.tensor, stage, micro, accumulation, remat),
            )


def _loaded(run: RunFile, candidate: Candidate) -> tuple[Candidate, Config] | Discarded:
    """A candidate with its configuration; a combination that breaks a rule is none."""
    try:
        return candidate, load_config(run.changed(candidate.changes()))
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
    replicas = _replica_sizes(config, gpus, gpus_per_host)
    tensors = _tensor_sizes(config, gpus, gpus_per_host)
    found: list[MeshShape] = []
    discarded: list[Discarded] = []
    for replica, tensor in itertools.product(replicas, tensors):
        label = f"replica {replica} x tensor {tensor}"
        data = gpus // (replica * tensor)
        if gpus % (replica * tensor):
            reason = f"{replica * tensor} does not divide {gpus} devices"
            discarded.append(Discarded(label, reason))
        elif reason := undividable(_units(config), tensor):
            discarded.append(Discarded(label, reason))
        elif not _varies(sweep, "data") and mesh.data not in (-1, data):
            reason = f'data would be {data}, but "sweep.axes" keeps it at {mesh.data}'
            discarded.append(Discarded(label, reason))
        else:
            found.append(MeshShape(replica=replica, data=data, tensor=tensor))
    return found, discarded


def _units(config: Config) -> dict[str, int]:
    """What `tensor` never cuts, unless rules by hand say what it cuts."""
    assert config.model is not None
    return {} if splits_tensor(config) else {"heads": config.model.heads}


def _varies(sweep: SweepConfig, axis: str) -> bool:
    return sweep.axes is None or axis in sweep.axes


def _replica_sizes(config: Config, gpus: int, gpus_per_host: int) -> list[int]:
    sweep, shard = config.sweep, config.zero.mics_shard_size
    own = config.mesh.replica
    if shard > 0:  # MiCS: groups of so many, copied between groups
        own = max(1, gpus // (config.mesh.tensor * shard))
    if sweep.replica is not None:
        return sorted(set(sweep.replica))
    if not _varies(sweep, "replica"):
        return [own]
    if sweep.axes is not None:
        return divisors(gpus)
    hosts = gpus // min(gpus, gpus_per_host)
    return sorted({1, own, hosts})


def _tensor_sizes(config: Config, gpus: int, gpus_per_host: int) -> list[int]:
    sweep = config.sweep
    if sweep.tensor is not None:
        return sorted(set(sweep.tensor))
    if not _varies(sweep, "tensor"):
        return [config.mesh.tensor]
    if not splits_tensor(config) and sweep.axes is None:
        return [config.mesh.tensor]
    return divisors(min(gpus, gpus_per_host))


def splits_tensor(config: Config) -> bool:
    """Whether a sharding rule splits a parameter over the `tensor` axis."""
    return any("tensor" in axes for _, axes in config.mesh.rules)


def micro_batch_sizes(sweep: SweepConfig, rows: int) -> list[int]:
    """The microbatches to try where a device has so many rows of a step."""
    if sweep.micro_batch_sizes is not None:
        return sorted(set(sweep.micro_batch_sizes))
    least, most = sweep.min_micro_batch_size, min(rows, sweep.max_micro_batch_size or rows)
    powers = [size for size in _powers_of_two(most) if size >= least]
    return _evenly(powers, sweep.micro_batch_count)


def _powers_of_two(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def _evenly(sizes: Sequence[int], count: int | None) -> list[int]:
    """So many of them, the first and the last included where there are two."""
    if count is None or count >= len(sizes):
        return list(sizes)
    if count == 1:
        return [sizes[-1]]
    step = (len(sizes) - 1) / (count - 1)
    return [sizes[round(turn * step)] for turn in range(count)]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]

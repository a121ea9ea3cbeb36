"""Single changes of a run that does not fit, each compiled, so that what they need is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jspeed.layout.logical import undividable
from jspeed.layout.rules import axes_of
from jspeed.pipeline.schedules import ONE_F_ONE_B
from jspeed.planner.pool import Job, Outcome
from jspeed.planner.run_file import RunFile

KINDS = ("mesh", "schedule", "stage", "remat", "microbatch")
"""What a run can change; in this order, so that the batch is what the microbatch says."""
RunJobs = Callable[[Iterable[Job]], Iterator[Outcome]]
"""Does jobs in any order, as `jspeed.planner.pool.run_jobs` with all else given."""


@dataclass(frozen=True)
class Where:
    """A cluster as a job names it.

    Attributes:
      target: a name, or the whole path of a file.
      gpus: in all.
      gpus_per_host: of a full host.
      on_cpu: whether its devices are those of this machine's CPU, which a worker must be given.
    """

    target: str
    gpus: int
    gpus_per_host: int
    on_cpu: bool = False

    def job(self, key: str, config: Mapping[str, Any], gpus: int | None = None) -> Job:
        """The job that plans a configuration here, or on another number of GPUs."""
        count = gpus or self.gpus
        request = {
            "config": dict(config),
            "target": self.target,
            "gpus": count,
            "gpus_per_host": min(self.gpus_per_host, count),
        }
        environment = {"JAX_NUM_CPU_DEVICES": str(count)} if self.on_cpu else {}
        return Job(key, request, environment)


@dataclass(frozen=True)
class Change:
    """One thing to do about a run.

    Attributes:
      kind: of what it changes, one of `KINDS`.
      text: for people.
      keys: path -> value in the run file; None removes the key.
      gpus: to run on instead; None: as many as now.
    """

    kind: str
    text: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    gpus: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"change": self.text, "keys": dict(self.keys), "gpus": self.gpus}


def single_changes(run: RunFile, plan: Mapping[str, Any]) -> list[Change]:
    """What of a run could be changed on its own to need less memory per device.

    Args:
      run: the run file.
      plan: of it, as JSON.
    """
    changes = [*_smaller_microbatches(plan), *_higher_stages(run, plan)]
    if run.config.model is not None and run.config.model.remat == "none":
        changes.append(Change("remat", "model.remat: full", {"model.remat": "full"}))
    changes += [*_other_schedules(run, plan), *_other_meshes(run, plan)]
    return changes if run.config.elasticity is None else [*map(_inelastic, changes)]


def _inelastic(change: Change) -> Change:
    """A change whose batch or mesh is its own, for a run that `elasticity` gives its batch."""
    if not {"train_batch_size", "mesh.data"} & set(change.keys):
        return change
    return replace(change, keys={**change.keys, "elasticity.enabled": None})


def together(run: RunFile, plan: Mapping[str, Any]) -> Change | None:
    """All of the changes that keep the GPUs, each at its most; None where there are not two.

    Of several meshes it takes the first: they rule each other out.
    """
    last: dict[str, Change] = {}
    for change in single_changes(run, plan):
        if change.gpus is None and not (change.kind == "mesh" and "mesh" in last):
            last[change.kind] = change
    if len(last) < 2:
        return None
    chosen = [last[kind] for kind in KINDS if kind in last]
    keys: dict[str, Any] = {}
    for change in chosen:
        keys |= change.keys
    return Change("together", " and ".join(change.text for change in chosen), keys)


def suggest(
    run: RunFile, where: Where, plan: Mapping[str, Any], run_jobs: RunJobs
) -> list[dict[str, Any]]:
    """Compiles the single changes of a run that does not fit; all of them together if none is
    enough.

    Args:
      run: the run file.
      where: the cluster.
      plan: of the run as it is, as JSON.
      run_jobs: compiles.

    Returns:
      One entry per change, those that fit first, the fastest of them first: `change`, `keys`,
      `gpus`, `fits`, `peak_bytes`, `limit_bytes`, `step_seconds`, or `error` with what refused it.
    """
    found = _compiled(single_changes(run, plan), run, where, run_jobs)
    if not any(entry["fits"] for entry in found):
        everything = together(run, plan)
        if everything is not None:
            found += _compiled([everything], run, where, run_jobs)
    return sorted(found, key=_order)


def _order(entry: Mapping[str, Any]) -> tuple[bool, bool, float]:
    return (
        not entry["fits"],
        "error" in entry,
        entry.get("step_seconds", 0.0) if entry["fits"] else entry.get("peak_bytes", 0),
    )


def _compiled(
    changes: list[Change], run: RunFile, where: Where, run_jobs: RunJobs
) -> list[dict[str, Any]]:
    by_key = {str(number): change for number, change in enumerate(changes)}
    jobs = [where.job(key, run.changed(change.keys), change.gpus) for key, change in by_key.items()]
    found = []
    for outcome in run_jobs(jobs):
        entry = by_key[outcome.key].to_json()
        if outcome.result is None:
            entry |= {"fits": False, "error": outcome.error}
        else:
            memory = outcome.result["memory"]
            entry |= {
                "fits": outcome.result["fits"],
                "peak_bytes": memory["peak_bytes"],
                "limit_bytes": memory["limit_bytes"],
                "step_seconds": outcome.result["step_seconds"],
            }
        found.append(entry)
    return found


def _smaller_microbatches(plan: Mapping[str, Any]) -> Iterator[Change]:
    """Half the microbatch, and one row, the global batch as it is."""
    micro = plan["micro_batch_size"]
    rows = plan["train_batch_size"] // _shards(plan["mesh"])
    for smaller in dict.fromkeys((micro // 2, 1)):
        if 0 < smaller < micro and rows % smaller == 0:
            yield Change(
                "microbatch",
                f"train_micro_batch_size_per_gpu: {smaller}",
                _batch(plan["train_batch_size"], smaller),
            )


def _higher_stages(run: RunFile, plan: Mapping[str, Any]) -> Iterator[Change]:
    if _shards(plan["mesh"]) > 1:
        for stage in range(plan["zero_stage"] + 1, 4):
            keys = {"zero_optimization.stage": stage}
            yield Change("stage", f"zero_optimization.stage: {stage}", keys)


def _other_schedules(run: RunFile, plan: Mapping[str, Any]) -> Iterator[Change]:
    """1F1B keeps activations of few microbatches, and nothing beside them."""
    if plan["mesh"]["pipe"] > 1 and run.config.pipeline.schedule != ONE_F_ONE_B:
        keys = {"pipeline.schedule": ONE_F_ONE_B, "pipeline.chunks": None}
        yield Change("schedule", f"pipeline.schedule: {ONE_F_ONE_B}", keys)


def _other_meshes(run: RunFile, plan: Mapping[str, Any]) -> list[Change]:
    """Sharding over copies too, tensor and pipeline parallelism where the model can be split, and
    twice the GPUs."""
    mesh, found = plan["mesh"], []
    if mesh["replica"] > 1 and plan["zero_stage"] > 0:
        data = mesh["replica"] * mesh["data"]
        keys = {
            "mesh.replica": None,
            "mesh.data": data,
            "zero_optimization.mics_shard_size": None,
        }
        found.append(Change("mesh", f"mesh.data: {data} without copies", keys))
    if mesh["data"] % 2 == 0:
        found += [_instead_of_data(plan, axis) for axis in _axes_to_double(run, plan)]
    rows, micro = plan["train_batch_size"], plan["micro_batch_size"]
    if plan["zero_stage"] > 0 and rows % (2 * micro * _shards(mesh)) == 0:
        gpus = 2 * plan["gpus"]
        keys = {"mesh.data": 2 * mesh["data"], **_batch(rows, micro)}
        found.append(Change("mesh", f"{gpus} GPUs: mesh.data {2 * mesh['data']}", keys, gpus))
    return found


def _axes_to_double(run: RunFile, plan: Mapping[str, Any]) -> Iterator[str]:
    """`tensor` within a host, if heads or rules let it; `pipe` where ZeRO leaves weights or
    gradients whole, since stages keep more activations than they save."""
    model, mesh = run.config.model, plan["mesh"]
    tensor = 2 * mesh["tensor"]
    by_rules = any(
        "tensor" in axes_of(entry) for _, spec in run.config.mesh.rules for entry in spec
    )
    by_heads = model is not None and not undividable({"heads": model.heads}, tensor)
    if tensor <= plan["gpus_per_host"] and (by_rules or by_heads):
        yield "tensor"
    if model is not None and 2 * mesh["pipe"] <= model.layers and plan["zero_stage"] < 3:
        yield "pipe"


def _instead_of_data(plan: Mapping[str, Any], axis: str) -> Change:
    """Twice an axis, half of `data`; the batch stays, in twice as many microbatches."""
    mesh = plan["mesh"]
    size, data = 2 * mesh[axis], mesh["data"] // 2
    keys = {
        f"mesh.{axis}": size,
        "mesh.replica": mesh["replica"],
        "mesh.data": data,
        "zero_optimization.mics_shard_size": None,
        **_batch(plan["train_batch_size"], plan["micro_batch_size"]),
    }
    if axis == "pipe":
        keys["pipeline.stages"] = None
    return Change("mesh", f"mesh.{axis}: {size} with mesh.data {data}", keys)


def _batch(rows: int, micro: int) -> dict[str, Any]:
    return {
        "train_batch_size": rows,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": None,
    }


def _shards(mesh: Mapping[str, int]) -> int:
    return mesh["replica"] * mesh["data"] * mesh["expert"]

"""What a plan says: the compiled step's memory, communication and time, put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jspeed.engine.build import RunPlan
from jspeed.engine.pipeline import Pipeline
from jspeed.layout.explain import Explanation, Share
from jspeed.layout.mesh import ZERO_AXES
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Role
from jspeed.planner.cluster import Cluster
from jspeed.planner.timeline import BUBBLE, Spent
from jspeed.planner.volume import Volume
from jspeed.profile.live_bytes import LiveBytes
from jspeed.profile.memory import Memory
from jspeed.profile.traffic import Traffic


@dataclass(frozen=True)
class Plan:
    """What a run needs and takes on a cluster; bytes and FLOPs are those of one device.

    Attributes:
      cluster: that it was compiled for.
      model: its family, or its class.
      state: where the training state lives.
      run: layout, batch sizes and optimizer.
      tokens: per step, of the global batch; None for a model that reads none.
      memory: by role.
      live: counts what is held over the step, which takes a moment.
      traffic: one entry per kind, axes and dtype of collectives, largest first.
      volume: beside the ZeRO paper's.
      time: where it goes; with a pipeline, of the stage that works longest.
      model_flops: of one step without recomputation, on one device; None where it is not known.
      remarks: what was assumed.
      pipeline: the schedule of the stages; None without stages.
    """

    cluster: Cluster
    model: str
    state: Explanation
    run: RunPlan
    tokens: int | None
    memory: Memory
    live: Callable[[], LiveBytes]
    traffic: tuple[Traffic, ...]
    volume: Volume
    time: Spent
    model_flops: float | None
    remarks: tuple[str, ...]
    pipeline: Pipeline | None = None

    @property
    def fits(self) -> bool:
        return self.memory.headroom >= 0

    @property
    def flops(self) -> float:
        """Of all matrix products that the compiled step runs, recomputation included."""
        return self.time.total_flops

    @property
    def samples_per_second(self) -> float:
        """Rows of the batch, of the whole cluster."""
        return self.run.batch.train_batch_size / self.time.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole cluster; None for a model that reads none."""
        return None if self.tokens is None else self.tokens / self.time.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (PaLM, appendix B): the model's FLOPs against the peak's; None
        where the model's are not known."""
        if self.model_flops is None:
            return None
        peak = self.cluster.target.peak_flops(self.run.layout.compute_dtype)
        return self.model_flops / (peak * self.time.seconds)

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        layout, batch, time = self.run.layout, self.run.batch, self.time
        return {
            "target": self.cluster.target.name,
            "gpus": self.cluster.gpus,
            "gpus_per_host": self.cluster.per_host,
            "model": {"family": self.model, "parameters": self.state.parameters},
            "mesh": dict(layout.sizes),
            "zero_stage": layout.stage,
            "compute_dtype": layout.compute_dtype,
            "train_batch_size": batch.train_batch_size,
            "micro_batch_size": batch.micro_batch_size,
            "gradient_accumulation_steps": batch.accumulation,
            "pipeline": self._pipeline_json(),
            "fits": self.fits,
            "memory": self.memory.to_json(),
            "collectives": [dict(entry) for entry in self.traffic],
            "volume": self.volume.to_json(),
            "flops": self.flops,
            "model_flops": self.model_flops,
            "step_seconds": time.seconds,
            "time": {
                "parts": dict(time.parts),
                "network_busy": dict(time.network),
            },
            "samples_per_second": self.samples_per_second,
            "tokens_per_step": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "bound": time.bound,
            "kept_whole": kept_whole(self.state),
            "suggestions": [],
            "remarks": list(self.remarks),
        }

    def _pipeline_json(self) -> dict[str, Any] | None:
        if self.pipeline is None:
            return None
        time = self.time
        return {
            **self.pipeline.to_json(),
            "busiest_stage": time.stage,
            "waiting": time.parts.get(BUBBLE, 0.0) / time.seconds,
        }


def kept_whole(state: Explanation) -> list[dict[str, str]]:
    """The parameters that every device holds whole although the ZeRO stage splits, with the reason;
    also those for which the layout gives none, judged by where their arrays live."""
    splits = state.stage > 0 and math.prod(state.sizes[axis] for axis in ZERO_AXES) > 1
    roles = {Role.MOMENTS}
    if state.stage == 3 or state.compute_dtype != "float32":  # in fp32 the master is the parameter
        roles.add(Role.MASTER)
    found = []
    for leaf in state.leaves:
        shares = [leaf.shares[role] for role in roles if role in leaf.shares]
        because = leaf.whole_because
        if not because and splits and not all(map(_over_zero_axes, shares)):
            because = f"no reason is known; stage {state.stage} was to split it"
        if because:
            found.append({"path": leaf.path, "because": because})
    return found


def _over_zero_axes(share: Share) -> bool:
    return any(axis in ZERO_AXES for entry in share.spec for axis in axes_of(entry))

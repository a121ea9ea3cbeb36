"""What of a run's configuration would take less of a device's memory, and about how much less.

State is exact: each change is laid out, without arrays. What the step takes beside it is estimated
from the buffers of the compiled step as it is, since compiling every change takes minutes; `jspeed
plan` does that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax

from jspeed.config import Config, load_config
from jspeed.config.batch import ACCUMULATION, MICRO
from jspeed.core.errors import ConfigError, JspeedError
from jspeed.engine.build import RunPlan, ScheduleFn, mesh_shape, plan_run
from jspeed.engine.state_explanation import explain_plan
from jspeed.layout.explain import Explanation
from jspeed.layout.mesh import make_abstract_mesh
from jspeed.layout.rules import Rule
from jspeed.profile.memory import ACTIVATIONS, GRADIENTS, OTHER, PIPELINE, WORKSPACE, Buffer
from jspeed.training.program import Program

_WORTH = 0.01
"""Of what a device holds: less is not worth a change."""


@dataclass(frozen=True)
class Relief:
    """One change of a configuration.

    Attributes:
      keys: path -> value.
      saves: bytes on one device, about.
      instead: of what, for people; empty where that says nothing.
    """

    keys: Mapping[str, Any]
    saves: int
    instead: str = ""

    def __str__(self) -> str:
        changed = (f'"{path}": {json.dumps(value)}' for path, value in self.keys.items())
        return " and ".join(changed) + (f" instead of {self.instead}" if self.instead else "")


@dataclass(frozen=True)
class Given:
    """A run as it is.

    Attributes:
      config: resolved.
      program: the model.
      plan: of the run, on a mesh of devices.
      optimizer, schedule, rules: as `plan_run` was given them.
    """

    config: Config
    program: Program
    plan: RunPlan
    optimizer: optax.GradientTransformation | None = None
    schedule: ScheduleFn | None = None
    rules: Sequence[Rule] = ()

    def explain(self, overrides: Iterable[str] = ()) -> Explanation:
        """Where the state would live with some keys changed, and nothing of the training.

        Raises:
          JspeedError: the configuration does not load so, the run cannot be so, or its global batch
            would be another.
        """
        overrides = tuple(overrides)
        if not overrides:
            return explain_plan(self.program, self.plan)
        config = load_config(self.config.to_dict(), overrides=overrides)
        config.require_trainable()
        shape = mesh_shape(config, math.prod(self.plan.layout.sizes.values()))
        plan = plan_run(
            config,
            self.program,
            make_abstract_mesh(shape),
            optimizer=self.optimizer,
            schedule=self.schedule,
            rules=self.rules,
        )
        before, after = self.plan.batch, plan.batch
        if after.train_batch_size != before.train_batch_size:
            raise ConfigError(
                f'"train_batch_size" would be {after.train_batch_size} instead of '
                f"{before.train_batch_size} with {' and '.join(overrides)}"
            )
        return explain_plan(self.program, plan)


def reliefs(
    given: Given,
    buffers: Sequence[Buffer],
    *,
    platform: str,
    sequence: int | None = None,
    rows: int | None = None,
    missing: int | None = None,
) -> list[Relief]:
    """The changes that take noticeably less, those that take least first.

    Args:
      given: the run as it is.
      buffers: of the compiled step at its peak, beside the state; none where it is not known.
      platform: of the devices.
      sequence: length of the sequences, where the model reads any.
      rows: of the batch that all devices compute at once, where the microbatch does not say.
      missing: bytes that a device lacks, where that is known: the microbatch is then lowered no
        further than that takes.
    """
    search = _Search(given, buffers, platform, sequence, missing)
    return search.found(by_rows=rows is None or rows == search.rows)


class _Search:
    def __init__(
        self,
        given: Given,
        buffers: Sequence[Buffer],
        platform: str,
        sequence: int | None,
        missing: int | None,
    ) -> None:
        self._given, self._config, self._plan = given, given.config, given.plan
        self._layout = given.plan.layout
        self._buffers, self._sequence, self._missing = buffers, sequence, missing
        self._on_gpu = platform in ("gpu", "cuda")
        self._state = _device_bytes(given.explain())

    @property
    def rows(self) -> int:
        """That all devices compute at once in training."""
        return self._plan.batch.micro_batch_size * self._layout.batch_shards

    def found(self, *, by_rows: bool) -> list[Relief]:
        """All of them, sorted; the microbatch if it says how many rows there are."""
        enough = _WORTH * (self._state + sum(buffer.bytes for buffer in self._buffers))
        every = (
            self._stage(),
            self._offload("offload_optimizer"),
            self._offload("offload_param"),
            self._remat(),
            self._microbatch() if by_rows else None,
            self._half_precision(),
            self._sequence_parallel(),
        )
        reliefs = [relief for relief in every if relief is not None and relief.saves > enough]
        return sorted(reliefs, key=lambda relief: -relief.saves)

    def _change(
        self, keys: Mapping[str, Any], saves: float = 0, instead: str = ""
    ) -> Relief | None:
        """The change of some keys, with what else than state it saves; None where the run cannot be
        so."""
        overrides = [f"{path}={json.dumps(value)}" for path, value in keys.items()]
        try:
            state = self._given.explain(overrides)
        except JspeedError:
            return None
        return Relief(keys, round(saves) + self._state - _device_bytes(state), instead)

    def _held(self, *roles: str) -> int:
        return sum(buffer.bytes for buffer in self._buffers if buffer.role in roles)

    @property
    def _of_examples(self) -> int:
        """What grows with the examples that are computed at once."""
        inner = (buffer for buffer in self._buffers if buffer.origin != WORKSPACE)
        roles = (ACTIVATIONS, OTHER, PIPELINE)
        return sum(buffer.bytes for buffer in inner if buffer.role in roles)

    def _stage(self) -> Relief | None:
        """The ZeRO stage that saves most; of those that save about as much the lowest."""
        ways = self._layout.zero_ways
        best: Relief | None = None
        for stage in range(self._layout.stage + 1, 4) if ways > 1 else ():
            saves = 0.0
            if self._layout.stage < 2 <= stage:
                saves += self._held(GRADIENTS) * (1 - 1 / ways)
            if stage == 3:
                saves -= self._gathered()
            relief = self._change({"zero_optimization.stage": stage}, saves)
            if relief is not None and (best is None or relief.saves > 1.05 * best.saves):
                best = relief
        return best

    def _gathered(self) -> int:
        """Weights that stage 3 has whole at a time: two layers, or the largest other one."""
        layers = others = 0
        for path, leaf in self._layout.leaves.items():
            if any(re.fullmatch(pattern, path) for pattern in self._given.program.stacked):
                layers += math.prod(leaf.shape[1:])
            else:
                others = max(others, math.prod(leaf.shape))
        return max(2 * layers, others) * jnp.dtype(self._layout.compute_dtype).itemsize

    def _offload(self, key: str) -> Relief | None:
        """State in host memory; on a CPU that is the device's own."""
        if not self._on_gpu or getattr(self._config.zero, key) is not None:
            return None
        return self._change({f"zero_optimization.{key}": {"device": "cpu"}})

    def _remat(self) -> Relief | None:
        """Layers keep what enters them, and compute the rest again, one at a time."""
        model = self._config.model
        if model is None or model.remat != "none" or self._sequence is None:
            return None
        layers = model.layers // self._layout.stages
        kept = sum(
            buffer.bytes
            for buffer in self._buffers
            if buffer.role in (ACTIVATIONS, OTHER) and f"[{layers}," in buffer.type
        )
        rows = self._plan.batch.micro_batch_size * self._sequence // self._layout.sizes["seq"]
        width = model.hidden_size * jnp.dtype(self._layout.compute_dtype).itemsize
        saves = kept * (1 - 1 / layers) - layers * rows * width
        return Relief({"model.remat": "full"}, round(saves))

    def _microbatch(self) -> Relief | None:
        """Fewer rows at once and more microbatches; as few fewer as does."""
        micro, best = self._plan.batch.micro_batch_size, None
        for smaller in _smaller(micro, micro * self._plan.batch.accumulation):
            saves = self._of_examples * (1 - smaller / micro)
            best = self._rows_at_once(smaller, saves) or best
            if best is not None and (self._missing is None or best.saves > self._missing):
                break
        return best

    def _rows_at_once(self, smaller: int, saves: float) -> Relief | None:
        micro = self._plan.batch.micro_batch_size
        if self._config.elasticity is None:
            keys = self._batch_keys(smaller, self._plan.batch.accumulation * micro // smaller)
            return self._change(keys, saves, self._now(keys))
        sizes = self._config.elasticity.micro_batch_sizes
        below = [size for size in sizes if size <= smaller]
        # Which batch is chosen follows from the sizes: whether it stays shows when they are tried.
        for tried in (below, sorted({*below, smaller})):
            keys = {"elasticity.micro_batch_sizes": tried}
            if tried and (relief := self._change(keys, saves, json.dumps(list(sizes)))):
                return relief
        return None

    def _batch_keys(self, micro: int, accumulation: int) -> dict[str, Any]:
        """Those to write for such a batch of as many rows: what the file gives, and what does not
        follow from it."""
        batch = self._config.batch
        keys: dict[str, Any] = {}
        if batch.micro_batch_size != micro:
            keys[MICRO] = micro
        follows = batch.gradient_accumulation_steps is None and batch.train_batch_size is not None
        if not follows and batch.gradient_accumulation_steps != accumulation:
            keys[ACCUMULATION] = accumulation
        return keys

    def _now(self, keys: Mapping[str, Any]) -> str:
        """What a batch's keys are, in their order."""
        batch = self._plan.batch
        sizes = {MICRO: batch.micro_batch_size, ACCUMULATION: batch.accumulation}
        return " and ".join(str(sizes[key]) for key in keys)

    def _half_precision(self) -> Relief | None:
        if self._layout.compute_dtype != "float32":
            return None
        return self._change({"bf16.enabled": True}, self._of_examples / 2)

    def _sequence_parallel(self) -> Relief | None:
        """Half a sequence on each of twice as many devices, once there is one row left."""
        sizes = self._layout.sizes
        one_row = self._plan.batch.micro_batch_size == 1
        if not one_row or self._config.model is None or self._sequence is None:
            return None
        if sizes["data"] % 2 or self._sequence % (2 * sizes["seq"]):
            return None
        halves = {"mesh.seq": 2 * sizes["seq"], "mesh.data": sizes["data"] // 2}
        halves |= self._batch_keys(1, 2 * self._plan.batch.accumulation)
        return self._change(halves, self._of_examples / 2)


def _smaller(micro: int, rows: int) -> Iterator[int]:
    """Smaller microbatches by halves, that divide the rows of a device."""
    while micro > 1:
        micro //= 2
        if rows % micro == 0:
            yield micro


def _device_bytes(state: Explanation) -> int:
    return state.total_bytes + sum(state.other_bytes.values())

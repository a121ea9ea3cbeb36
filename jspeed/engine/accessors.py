"""What an engine tells about itself, under DeepSpeed's names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspeed.core.tree import named_leaves
from jspeed.engine.build import RunPlan
from jspeed.layout.zero import Layout
from jspeed.training.program import Program
from jspeed.training.state import TrainState
from jspeed.training.step import Metrics


class Accessors:
    """The read-only half of `Engine`."""

    plan: RunPlan
    state: TrainState
    global_steps: int
    _program: Program
    _metrics: Metrics | None

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    def parameters(self) -> dict[str, np.ndarray]:
        """All parameters in fp32, whole, on the host: path -> array. Needs their memory there."""
        return {path: np.asarray(leaf) for path, leaf in named_leaves(self.state.master)}

    @property
    def module(self) -> Any:
        """The model with a copy of its present parameters in fp32: an NNX module, or a callable."""
        copy = jax.tree.map(jnp.copy, (self.state.master, self.state.mutable))
        return self._program.bind(*copy)

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a gradient was not finite. Waits for the device."""
        return int(self.state.step) - int(self.state.updates)

    @property
    def global_samples(self) -> int:
        return self.global_steps * self.train_batch_size()

    @property
    def micro_steps(self) -> int:
        return self.global_steps * self.gradient_accumulation_steps()

    @property
    def world_size(self) -> int:
        return self.layout.mesh.size

    @property
    def global_rank(self) -> int:
        return jax.process_index()

    def train_batch_size(self) -> int:
        return self.plan.batch.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.plan.batch.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.plan.batch.accumulation

    def zero_optimization_stage(self) -> int:
        return self.layout.stage

    def fp16_enabled(self) -> bool:
        return self.layout.compute_dtype == "float16"

    def bfloat16_enabled(self) -> bool:
        return self.layout.compute_dtype == "bfloat16"

    def gradient_clipping(self) -> float:
        return self.plan.step.gradient_clipping

    def get_lr(self) -> list[float]:
        """The learning rate that the next step will use; empty if the optimizer hides it."""
        if self.plan.schedule is None:
            return []
        return [float(self.plan.schedule(self.state.updates))]

    def get_global_grad_norm(self) -> float | None:
        """The gradient norm of the last step before clipping, or None before the first."""
        return None if self._metrics is None else float(self._metrics["grad_norm"])

    def loss_scale(self) -> float:
        """fp16's current loss scale; 1 otherwise."""
        scale = self.state.loss_scale
        return 1.0 if scale is None else float(scale.scale)

    def was_step_applied(self) -> bool:
        """Whether the last step changed the parameters."""
        return self._metrics is not None and bool(
            self._metrics["finite"] | (not self.plan.step.skip_nonfinite)
        )

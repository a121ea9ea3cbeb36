"""`jspeed.initialize` and the engine: a thin object around the pure train step and its state."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jspeed.config import BatchConfig, Config, load_config
from jspeed.core.errors import ConfigError
from jspeed.engine import checkpoints, compilation
from jspeed.engine.accessors import Accessors
from jspeed.engine.batches import BatchPlacer
from jspeed.engine.build import RunPlan, ScheduleFn, plan_devices, plan_run
from jspeed.engine.not_in_jspeed import raise_called, raise_not_in_jspeed
from jspeed.engine.reporting import Reporter
from jspeed.layout.rules import Rule
from jspeed.training.contracts import check_callable
from jspeed.training.program import LossFn, Program, make_program
from jspeed.training.state import TrainState, abstract_state, create_state
from jspeed.training.step import Metrics, make_eval_step, make_train_step


def initialize(
    *,
    model: Any,
    loss_fn: LossFn,
    config: str | os.PathLike[str] | Mapping[str, Any] | Config,
    model_parameters: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    lr_scheduler: ScheduleFn | None = None,
    eval_fn: LossFn | None = None,
    rules: Sequence[tuple[str, Sequence[Any]]] = (),
    stacked: Sequence[str] = (),
    devices: Sequence[Any] | None = None,
    seed: int = 0,
    report: bool = True,
) -> Engine:
    """Makes an engine that trains a model as a DeepSpeed configuration says.

    Args:
      model: a Flax NNX module, a function `rngs -> NNX module` (created sharded, never whole on one
        device), a Linen module, or a pair `(init, apply)` of functions.
      loss_fn: `(model, batch, rng) -> scalar mean` or `LossSum(total, weight)`. For NNX `model` is
        the module itself; otherwise a callable that carries the parameters.
      config: a path, a mapping, or a loaded `Config`.
      model_parameters: for Linen modules and pairs: the variables, or a function `key ->
        variables`.
      optimizer: any optax optimizer; wins over the configuration's.
      lr_scheduler: any optax schedule; wins over the configuration's.
      eval_fn: as `loss_fn`, for `eval_batch`; `loss_fn` when None.
      rules: `(regex on the parameter's path, spec)` pairs for `tensor` and `seq`, before those of
        `mesh.rules`.
      stacked: regexes of parameters whose first dimension stacks layers.
      devices: to run on; all devices when None.
      seed: of initial parameters and of the step's random keys.
      report: log every `steps_per_print` steps and write to the configured monitors.

    Returns:
      The engine, its state created on the devices.

    Raises:
      ConfigError, LayoutError, ModelError: what cannot be, and what would.
    """
    loaded = config if isinstance(config, Config) else load_config(config)
    check_callable(loss_fn, "loss_fn", ("model", "batch", "rng"))
    if eval_fn is not None:
        check_callable(eval_fn, "eval_fn", ("model", "batch", "rng"))
    program = make_program(model, model_parameters, tuple(stacked))
    mesh = plan_devices(loaded, devices)
    loaded = loaded.resolve_auto(compilation.auto_facts(loaded, program, mesh))
    loaded.require_trainable()
    return Engine(
        config=loaded,
        program=program,
        mesh=mesh,
        loss_fn=loss_fn,
        eval_fn=eval_fn or loss_fn,
        optimizer=optimizer,
        schedule=lr_scheduler,
        rules=tuple(Rule(pattern, tuple(spec)) for pattern, spec in rules),
        seed=seed,
        report=report,
    )


class Engine(Accessors):
    """Trains one model on one mesh. Made by `initialize`.

    Attributes:
      config: the resolved configuration.
      layout: where every parameter lives.
      state: all arrays of the run; replaced by each `train_batch`.
      train_step: the pure, jitted function `(state, placed batch) -> (state, metrics)`, for loops
        of one's own; it consumes the state it is given.
      global_steps: optimizer steps so far, skipped ones included.
    """

    def __init__(
        self,
        *,
        config: Config,
        program: Program,
        mesh: Mesh,
        loss_fn: LossFn,
        eval_fn: LossFn,
        optimizer: optax.GradientTransformation | None,
        schedule: ScheduleFn | None,
        rules: Sequence[Rule] = (),
        seed: int = 0,
        report: bool = True,
    ) -> None:
        self.config = config
        self._program = program
        self._loss_fn = loss_fn
        self._given = (optimizer, schedule, tuple(rules))
        self.plan: RunPlan = plan_run(
            config, program, mesh, optimizer=optimizer, schedule=schedule, rules=rules
        )
        self._eval_step = make_eval_step(
            program, eval_fn, self.plan.layout, self.plan.step.gradients
        )
        self._eval_jit: Callable[..., Any] = jax.jit(self._eval_step)
        self.state: TrainState = create_state(
            program, self.plan.optimizer, self.layout, seed=seed, loss_scale=self.plan.loss_scale
        )
        self.global_steps = 0
        # Virtual CPU devices share one pool of threads: two programs with collectives in flight
        # can wait for each other for ever.
        self._one_at_a_time = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        self._metrics: Metrics | None = None
        self._store: checkpoints.EngineCheckpoints | None = None
        self._compile_step()
        self._reporter = Reporter(config, rows_per_step=self.train_batch_size()) if report else None

    def _compile_step(self) -> None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        step = make_train_step(
            self._program,
            self._loss_fn,
            self.plan.optimizer,
            self.layout,
            self.plan.step,
            self.plan.schedule,
        )
        self.train_step = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=compilation.step_options(self.config, self.layout),
        )
        self.place_batch = BatchPlacer(
            self.layout,
            rows=self.plan.batch.train_batch_size // jax.process_count(),
            accumulation=self.plan.batch.accumulation,
        )

    def train_batch(self, batch: Any) -> Metrics:
        """One optimizer step on one global batch.

        Args:
          batch: a pytree of arrays `[rows, ...]`, where rows is this process's share of
            `train_batch_size`.

        Returns:
          Scalars on the device: `loss` (the exact mean over the global batch), `grad_norm` (before
          clipping), `weight`, `finite`, `learning_rate`, and `loss_scale` under fp16. Reading one
          waits for the step.

        Raises:
          DataError: the batch has another number of rows.
        """
        self.state, metrics = self.train_step(self.state, self.place_batch(batch))
        if self._one_at_a_time:
            jax.block_until_ready(metrics["loss"])
        self._metrics = metrics
        self.global_steps += 1
        if self._reporter is not None:
            self._reporter.step(self.global_steps, metrics)
        return metrics

    def eval_batch(self, batch: Any) -> dict[str, jax.Array]:
        """The loss of a batch in evaluation mode, without changing anything.

        Args:
          batch: a pytree of arrays `[rows, ...]`, rows divisible by this process's share of the
            batch shards.

        Returns:
          `loss` (the mean), `total` and `weight`, so that means over several batches can be exact.
        """
        rows = np.shape(jax.tree.leaves(batch)[0])[0]
        placed = BatchPlacer(self.layout, rows=rows, accumulation=None)(batch)
        total, weight = self._eval_jit(self.state, placed)
        if self._one_at_a_time:
            jax.block_until_ready(weight)
        return {"loss": total / weight, "total": total, "weight": weight}

    def abstract_state(self) -> TrainState:
        """The state as shapes with shardings."""
        return abstract_state(self._program, self.plan.optimizer, self.layout, self.plan.loss_scale)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the global batch by changing how many microbatches are accumulated.

        Raises:
          ConfigError: not a multiple of the microbatch times the data-parallel size.
        """
        unit = self.plan.batch.micro_batch_size * self.layout.batch_shards
        if train_batch_size <= 0 or train_batch_size % unit:
            below = max(unit, train_batch_size // unit * unit)
            raise ConfigError(
                f'"train_batch_size": {train_batch_size} is not a multiple of micro batch x '
                "data-parallel size = "
                f"{self.plan.batch.micro_batch_size} x {self.layout.batch_shards} = {unit}. Use "
                f"{below} or "
                f"{below + unit}."
            )
        self._rebatch(train_batch_size, self.plan.batch.micro_batch_size)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the microbatch, and with it the global batch; accumulation stays."""
        if micro_batch_size <= 0:
            raise ConfigError(
                f'"train_micro_batch_size_per_gpu": {micro_batch_size}; expected at least 1.'
            )
        batch = self.plan.batch
        train = micro_batch_size * batch.accumulation * self.layout.batch_shards
        self._rebatch(train, micro_batch_size)

    def _rebatch(self, train_batch_size: int, micro_batch_size: int) -> None:
        sizes = BatchConfig(train_batch_size, micro_batch_size, None)
        config = dataclasses.replace(self.config, batch=sizes)
        optimizer, schedule, rules = self._given
        self.plan = plan_run(
            config,
            self._program,
            self.layout.mesh,
            optimizer=optimizer,
            schedule=schedule,
            rules=rules,
        )
        self.config = config
        self._compile_step()

    # --- checkpoints
    # ----------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        *,
        files: Mapping[str, bytes] | None = None,
        wait: bool = False,
    ) -> str:
        """Saves everything that resuming needs, in the background; returns the tag.

        Args:
          save_dir: directory of the checkpoints.
          tag: name of this one; `global_step{N}` when None.
          client_state: JSON-able values of one's own, returned by `load_checkpoint`.
          save_latest: point `latest` at this checkpoint once it is complete.
          files: small files to keep beside the arrays.
          wait: return only once the checkpoint is complete on disk.

        Raises:
          CheckpointError: the directory cannot be written, or an earlier save failed.
        """
        return self._checkpoints(save_dir).save(
            self, tag, dict(client_state or {}), save_latest, dict(files or {}), wait
        )

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Restores a checkpoint saved by any mesh, ZeRO stage or number of processes.

        Args:
          load_dir: directory of the checkpoints.
          tag: which one; the latest when None.
          load_optimizer_states: False keeps the optimizer's state as it is.
          load_lr_scheduler_states: False starts the schedule anew.
          load_module_only: parameters and mutable collections only; step and optimizer stay as they
            are.

        Returns:
          `(tag, client_state)`.

        Raises:
          CheckpointError: missing, incomplete, damaged, foreign, or of another model; names what is
            wrong.
        """
        return self._checkpoints(load_dir).load(
            self,
            tag,
            optimizer=load_optimizer_states and not load_module_only,
            schedule=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
        )

    def save_16bit_model(
        self, save_dir: str | os.PathLike[str], save_filename: str = "model.safetensors"
    ) -> str:
        """Writes the whole parameters in the 16-bit compute dtype (bf16 under fp32) for others.

        Gathers one parameter after the other, under any ZeRO stage. Returns the file's path.

        Raises:
          MissingExtraError: safetensors is not installed (extra `hf`).
        """
        return checkpoints.save_16bit(self, save_dir, save_filename)

    def close(self) -> None:
        """Waits for the running save, reports the last step and closes the monitors."""
        if self._reporter is not None:
            self._reporter.close()
        self.wait_for_checkpoint()

    destroy = close

    def wait_for_checkpoint(self) -> None:
        """Waits until the save that is running is complete; raises `CheckpointError` if it
        failed."""
        if self._store is not None:
            self._store.wait()

    def latest_checkpoint(self, load_dir: str | os.PathLike[str]) -> str | None:
        """The tag that `latest` names in a directory, or None where nothing was saved."""
        return self._checkpoints(load_dir).store.latest()

    def prune_checkpoints(self, keep: int) -> None:
        """Removes all but the newest `keep` checkpoints of the directory last saved to."""
        if self._store is not None:
            self._store.store.prune(keep)

    def _checkpoints(self, directory: str | os.PathLike[str]) -> checkpoints.EngineCheckpoints:
        if self._store is None or self._store.directory != os.fspath(directory):
            self.wait_for_checkpoint()
            self._store = checkpoints.EngineCheckpoints(directory)
        return self._store

    def __getattr__(self, name: str) -> Any:
        return raise_not_in_jspeed(name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return raise_called()

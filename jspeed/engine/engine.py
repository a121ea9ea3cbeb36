"""`jspeed.initialize` and the engine: a thin object around the pure train step and its state."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jspeed.config import Config, load_config
from jspeed.core.errors import ConfigError
from jspeed.core.tree import named_leaves
from jspeed.engine import arguments, compilation
from jspeed.engine.batches import BatchPlacer, replicated, rows_to_evaluate
from jspeed.engine.build import RunPlan, ScheduleFn, plan_devices, plan_run
from jspeed.engine.checked_step import CheckedStep
from jspeed.engine.checkpointing import Checkpointing
from jspeed.engine.checkpoints import EngineCheckpoints
from jspeed.engine.counters import Counters
from jspeed.engine.distributed import init_distributed
from jspeed.engine.memory_breakdown import log_memory, memory_around
from jspeed.engine.memory_errors import EVALUATING, RUNNING
from jspeed.engine.not_in_jspeed import (
    EVAL_BATCH,
    INITIALIZE,
    TRAIN_BATCH,
    raise_called,
    raise_not_in_jspeed,
    raise_unpacked,
    refuses,
    takes_names_only,
)
from jspeed.engine.offloading import make_host_state
from jspeed.engine.parking import Parking
from jspeed.engine.pretrained import load_weights, pretrained_weights
from jspeed.engine.profiled import Profiled
from jspeed.engine.reporting import Reporter, heed_log_level
from jspeed.engine.sparse_attention import sets_pattern
from jspeed.layout.mesh import one_at_a_time
from jspeed.layout.rules import Rule
from jspeed.models import ModelFactory
from jspeed.training.contracts import check_callable
from jspeed.training.program import LossFn, Program, make_program
from jspeed.training.state import TrainState, abstract_parameters, create_state, host_gradients
from jspeed.training.step import Metrics, make_eval_step


@refuses(INITIALIZE)
@takes_names_only("model", "loss_fn", "config")
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
    seed: int | None = None,
    report: bool = True,
) -> Engine:
    """Makes an engine that trains a model as a DeepSpeed configuration says.

    Args:
      model: a Flax NNX module, a function `rngs -> NNX module` (created sharded, never whole on one
        device), a Linen module, or a pair `(init, apply)` of functions. One of `model_from_hf`
        starts from the weights of its folder.
      loss_fn: `(model, batch, rng) -> scalar mean` or `LossSum(total, weight)`. For NNX `model` is
        the module itself; otherwise a callable that carries the parameters.
      config: a path, a mapping, or a loaded `Config`.
      model_parameters: for Linen modules and pairs: the variables, or a function `key ->
        variables`.
      optimizer: any optax optimizer; wins over the configuration's.
      lr_scheduler: any optax schedule; wins over the configuration's. An `optimizer` that is passed
        has its own schedule inside, and this one only serves reports.
      eval_fn: as `loss_fn`, for `eval_batch`; `loss_fn` when None.
      rules: `(regex on the parameter's path, spec)` pairs for `tensor` and `seq`, before those of
        `mesh.rules`.
      stacked: regexes of parameters whose first dimension stacks layers.
      devices: to run on; all devices when None.
      seed: of initial parameters and of the step's random keys; when None `run.seed` of the
        configuration, or 0.
      report: log every `steps_per_print` steps and write to the configured monitors.

    Returns:
      The engine, its state created on the devices.

    Raises:
      ConfigError, LayoutError, ModelError: what cannot be, and what would.
      CheckpointError: the folder of a `model_from_hf` does not hold the model's weights.
      OutOfMemoryError: the devices cannot hold the training state.
    """
    init_distributed()
    loaded = config if isinstance(config, Config) else load_config(config)
    check_callable(loss_fn, "loss_fn", ("model", "batch", "rng"))
    if eval_fn is not None:
        check_callable(eval_fn, "eval_fn", ("model", "batch", "rng"))
    arguments.check_optimizer(optimizer)
    arguments.check_schedule(lr_scheduler)
    arguments.check_devices(devices)
    own_rules, own_stacked = arguments.read_rules(rules), arguments.read_stacked(stacked)
    program = make_program(model, model_parameters, own_stacked, adapt=sets_pattern(loaded))
    if own_stacked:
        paths = (path for path, _ in named_leaves(abstract_parameters(program)[0]))
        arguments.check_stacked_used(own_stacked, paths)
    mesh = plan_devices(loaded, devices)
    loaded = loaded.resolve_auto(compilation.auto_facts(loaded, program, mesh))
    loaded.require_trainable()
    factory = model if isinstance(model, ModelFactory) else None
    with pretrained_weights(factory, program) as weights:
        engine = Engine(
            config=loaded,
            program=program,
            mesh=mesh,
            loss_fn=loss_fn,
            eval_fn=eval_fn or loss_fn,
            optimizer=optimizer,
            schedule=lr_scheduler,
            rules=own_rules,
            seed=_seed(loaded) if seed is None else seed,
            report=report,
        )
        engine.model_factory = factory
        if weights is not None:
            with engine.out_of_memory_explained("loading the model's weights"):
                load_weights(engine, weights)
    return engine


def _seed(config: Config) -> int:
    return config.run.seed if config.run else 0


class Engine(Checkpointing, Parking, Profiled):
    """Trains one model on one mesh. Made by `initialize`.

    Attributes:
      config: the resolved configuration.
      layout: where every parameter lives.
      train_step: the pure, jitted function `(state, placed batch) -> (state, metrics)`, for loops
        of one's own; it consumes the state it is given. Afterwards set `engine.state`.
      loss_limit: the next steps change nothing where their loss is larger, if the configuration has
        such steps skipped (`run.anomalies`).
    """

    loss_limit: float = math.inf

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
        self.plan: RunPlan = self._plan(mesh)
        self._eval_step = make_eval_step(
            program, eval_fn, self.plan.layout, self.plan.step.gradients
        )
        self._eval_jit: Callable[..., Any] = self._checked(jax.jit(self._eval_step))
        with self.out_of_memory_explained("creating the training state"):
            self._state: TrainState = create_state(
                program,
                self.plan.optimizer,
                self.layout,
                seed=seed,
                loss_scale=self.plan.loss_scale,
            )
            self._offloading = make_host_state(config, program, self.plan)
            if self._offloading is not None:
                self._state = self._offloading.start(self._state, seed)
                self._eval_jit = self._offloading.evaluation(self._eval_jit)
        self._steps: int | None = 0
        self._counters = Counters()
        self._one_at_a_time = one_at_a_time(mesh)
        self._metrics: Metrics | None = None
        self._store: EngineCheckpoints | None = None
        self._compile_step()
        if config.memory_breakdown or self.is_profiled:
            heed_log_level(config, prints=True)
        if config.memory_breakdown:
            log_memory("with the engine made", jax.block_until_ready(self._state), self.layout)
        self._reporter: Reporter | None = None
        if report:
            self._reporter = Reporter(config, parameters=self.layout.trained)

    def _watched(self, what: str) -> AbstractContextManager[None]:
        """Around what `memory_breakdown` looks at."""
        if not self.config.memory_breakdown:
            return nullcontext()
        return memory_around(what, lambda: self._state, self.layout)

    def _plan(self, mesh: Mesh) -> RunPlan:
        optimizer, schedule, rules = self._given
        return plan_run(
            self.config,
            self._program,
            mesh,
            optimizer=optimizer,
            schedule=schedule,
            rules=rules,
        )

    def _checked(self, jitted: Any) -> Any:
        """What is compiled for a pipeline is looked at before it runs."""
        return jitted if self.layout.stages == 1 else CheckedStep(jitted, self.layout.sizes)

    def _compile_step(self) -> None:
        step = compilation.jit_step(self.config, self._program, self._loss_fn, self.plan)
        self.train_step = self._device_step = self._checked(step)
        self._forget_program()
        if self._offloading is not None:
            self.train_step = self._offloading.step(self.train_step)
        self.place_batch = BatchPlacer(
            self.layout,
            rows=self.plan.batch.train_batch_size // self.data_share.count,
            accumulation=self.plan.batch.accumulation,
        )

    def _state_to_run(self) -> TrainState:
        """The state as the next step is given it."""
        if not self.plan.step.skip_losses:
            return self._state
        return replace(self._state, loss_limit=replicated(self.loss_limit, self.layout))

    @refuses(TRAIN_BATCH)
    def train_batch(self, batch: Any) -> Metrics:
        """One optimizer step on one global batch.

        Args:
          batch: a pytree of arrays `[rows, ...]`, where rows is this process's share of
            `train_batch_size`.

        Returns:
          Scalars on the device: `loss` (the exact mean over the global batch), `grad_norm` (before
          clipping), `weight`, `finite`, `applied` (whether the step changed anything),
          `learning_rate`, and `loss_scale` under fp16. Reading one waits for the step.

        Raises:
          DataError: the batch has another number of rows.
          OutOfMemoryError: a device cannot hold the step; who holds what, and what would help.
        """
        self.check_reloaded()
        steps = self.global_steps
        with self._watched(f"step {steps + 1}"), self.out_of_memory_explained(RUNNING, batch):
            placed, state = self.place_batch(batch), self._state_to_run()
            with self._profiled(steps + 1, state, placed):
                self._state, metrics = self.train_step(state, placed)
            self.wait_at_first(self.train_step, placed, metrics["loss"])
        self._metrics = metrics
        self._steps = steps + 1
        if self._reporter is not None:
            self._reporter.step(self._steps, self.global_samples, metrics)
        return metrics

    @refuses(EVAL_BATCH)
    def eval_batch(self, batch: Any) -> dict[str, jax.Array]:
        """The loss of a batch in evaluation mode, without changing anything.

        Args:
          batch: a pytree of arrays `[rows, ...]`, rows divisible by this process's share of the
            batch shards.

        Returns:
          `loss` (the mean), `total` and `weight`, so that means over several batches can be exact.

        Raises:
          DataError: the batch is empty, or its rows do not divide.
          OutOfMemoryError: as `train_batch`.
        """
        self.check_reloaded()
        rows = rows_to_evaluate(batch, self.layout)
        watched = self._watched(f"an evaluation after step {self.global_steps}")
        with watched, self.out_of_memory_explained(EVALUATING, batch):
            placed = BatchPlacer(self.layout, rows=rows, accumulation=None)(batch)
            total, weight = self._eval_jit(self.state, placed)
            self.wait_at_first(self._eval_jit, placed, weight)
        return {"loss": total / weight, "total": total, "weight": weight}

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
        counted = self.counters()
        keys = self.config.to_dict()
        keys.pop("gradient_accumulation_steps", None)  # follows from the two others
        keys.pop("elasticity", None)  # the program says its own sizes
        keys["train_batch_size"] = train_batch_size
        keys["train_micro_batch_size_per_gpu"] = micro_batch_size
        before = self.config
        self.config = load_config(keys)
        try:
            plan = self._plan(self.mesh)
            if self._offloading is not None:
                self._offloading.rebatched(plan)
        except BaseException:
            self.config = before
            raise
        self._counters, self.plan = counted, plan
        # Those that microbatches add up may have another dtype than one's own.
        self._state = replace(self._state, host_gradients=host_gradients(self.layout))
        self._compile_step()

    def close(self) -> None:
        """Waits for the running save, reports the last step, and what `comms_logger` counted, and
        closes the monitors."""
        self.tell_at_end()
        if self._reporter is not None:
            self._reporter.close()
        self.wait_for_checkpoint()
        if self._offloading is not None:
            self._offloading.close()

    destroy = close

    def __getattr__(self, name: str) -> Any:
        return raise_not_in_jspeed(name)

    def __iter__(self) -> Any:
        return raise_unpacked()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return raise_called()

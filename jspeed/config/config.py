"""The configuration of a run: typed, frozen, and able to say where each value comes from."""

from dataclasses import dataclass, field
from typing import Any, Literal

from jspeed.config import build, elastic_rules, patterns, remat_rules
from jspeed.config.auto import AutoFacts, resolve, unresolved
from jspeed.config.batch import resolve_batch
from jspeed.config.dump import KeyReport, dump, key_reports
from jspeed.config.key import LATER
from jspeed.config.keys_optimizer import OPTIMIZERS, find_family
from jspeed.config.problem import Problem, config_error, shown
from jspeed.config.rules import broken_rules
from jspeed.config.sections import (
    ActivationCheckpointingConfig,
    BatchConfig,
    DataConfig,
    ElasticityConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    PrecisionConfig,
    SchedulerConfig,
    SparseAttentionConfig,
    TensorParallelConfig,
    ZeroConfig,
)
from jspeed.config.sections_run import (
    CheckpointConfig,
    ClusterConfig,
    CommsLoggerConfig,
    FlopsProfilerConfig,
    MonitorConfig,
    RunConfig,
    SweepConfig,
)
from jspeed.config.values import Values

_OFF = "Switch it off to train."


@dataclass(frozen=True, slots=True)
class Config:
    """A complete, validated configuration; `load_config` makes one.

    `optimizer`, `scheduler`, `model`, `data` and `run` are None where the file does not have the
    section, and `elasticity` where it is off. `autos` names the keys whose "auto" still waits for
    facts; until `resolve_auto` the typed fields hold the defaults in their place.
    """

    batch: BatchConfig
    elasticity: ElasticityConfig | None
    optimizer: OptimizerConfig | None
    scheduler: SchedulerConfig | None
    precision: PrecisionConfig
    gradient_clipping: float
    prescale_gradients: bool
    gradient_predivide_factor: float
    gradient_allreduce_op: Literal["mean", "sum"]
    zero: ZeroConfig
    mesh: MeshConfig
    trainable: tuple[str, ...] | None
    pipeline: PipelineConfig
    tensor_parallel: TensorParallelConfig
    sparse_attention: SparseAttentionConfig | None
    model: ModelConfig | None
    data: DataConfig | None
    run: RunConfig | None
    cluster: ClusterConfig
    sweep: SweepConfig
    tensorboard: MonitorConfig
    csv_monitor: MonitorConfig
    wandb: MonitorConfig
    steps_per_print: int | None
    flops_profiler: FlopsProfilerConfig
    comms_logger: CommsLoggerConfig
    wall_clock_breakdown: bool
    memory_breakdown: bool
    dump_state: bool
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None
    throughput_timer: bool
    throughput_synchronized: bool
    checkpoint: CheckpointConfig
    activation_checkpointing: ActivationCheckpointingConfig
    report: tuple[KeyReport, ...] = field(repr=False, compare=False)
    autos: tuple[str, ...] = ()
    _values: Values = field(repr=False, compare=False, default_factory=lambda: Values({}))
    _given: Values = field(repr=False, compare=False, default_factory=lambda: Values({}))

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved configuration under its canonical keys, ready for JSON.

        It holds every key that jspeed acts on, with its default where nothing was given, and
        all other keys that were given. Loading it gives an equal configuration.
        """
        return dump(self._values, self)

    def switched_on_later(self) -> tuple[Problem, ...]:
        """Return a problem for every key that asks for what is not built yet, or not for models
        that are not jspeed's own."""
        return (*_later(self._values), *remat_rules.without_model(self._values))

    def require_trainable(self) -> None:
        """Check that a training run can honour every key.

        Raises:
            ConfigError: keys ask for features that are understood but not built yet, or hold an
                "auto" that nothing has resolved; all of them are listed.
        """
        problems = [
            *self.switched_on_later(),
            *map(unresolved, self.autos),
        ]
        if problems:
            raise config_error(problems)

    def resolve_auto(self, facts: AutoFacts | None = None) -> "Config":
        """Return this configuration with every "auto" resolved.

        Args:
            facts: what is known about the run; what it leaves open comes from the `model` and
                `run` sections.

        Raises:
            ConfigError: an "auto" that nothing resolves (the text says what would), a value
                that breaks a rule, or batch sizes that do not hold on `facts.data_parallel_size`.
        """
        facts = facts or AutoFacts()
        values, open_autos = resolve(self._given, facts)
        values = build.derive(values)
        problems = [*map(unresolved, open_autos), *broken_rules(values)]
        if problems:
            raise config_error(problems)
        config = from_values(values, self._given)
        if facts.data_parallel_size is not None:
            resolve_batch(config, facts.data_parallel_size)
        return config


def _later(values: Values) -> list[Problem]:
    problems = []
    for path, entry in values.given.items():
        if entry.key.treatment is LATER and entry.key.switches_on(entry.value):
            note = f" ({entry.note})" if entry.note else ""
            problems.append(
                Problem(path, f"{shown(entry.value)}{note}: {entry.key.reason}. {_OFF}", entry.line)
            )
    if values.is_given("optimizer.type"):
        family = find_family(OPTIMIZERS, values.get("optimizer.type"))
        if family is not None and family.treatment is LATER:
            line = values.line("optimizer.type")
            problems.append(
                Problem("optimizer.type", f'"{family.name}": {family.reason}. {_OFF}', line)
            )
    return problems


def from_values(values: Values, given: Values) -> Config:
    """Return the configuration that resolved `values` describe; `given` are those of the file."""
    optimizer, scheduler = build.optimizer(values), build.scheduler(values)
    return Config(
        batch=build.batch(values),
        elasticity=elastic_rules.of_section(values),
        optimizer=optimizer,
        scheduler=scheduler,
        precision=build.precision(values),
        gradient_clipping=values.get("gradient_clipping"),
        prescale_gradients=values.get("prescale_gradients"),
        gradient_predivide_factor=values.get("gradient_predivide_factor"),
        gradient_allreduce_op=values.get("gradient_allreduce_op"),
        zero=build.zero(values),
        mesh=build.mesh(values),
        trainable=build.trainable(values),
        pipeline=build.pipeline(values),
        tensor_parallel=build.tensor_parallel(values),
        sparse_attention=patterns.of_section(values),
        model=build.model(values),
        data=build.data(values),
        run=build.run(values),
        cluster=build.cluster(values),
        sweep=build.sweep(values),
        tensorboard=build.monitor(values, "tensorboard"),
        csv_monitor=build.monitor(values, "csv_monitor"),
        wandb=build.monitor(values, "wandb"),
        steps_per_print=values.get("steps_per_print"),
        flops_profiler=build.flops_profiler(values),
        comms_logger=build.comms_logger(values),
        wall_clock_breakdown=values.get("wall_clock_breakdown"),
        memory_breakdown=values.get("memory_breakdown"),
        dump_state=values.get("dump_state"),
        log_level=values.get("log_level"),
        throughput_timer=values.get("timers.throughput.enabled"),
        throughput_synchronized=values.get("timers.throughput.synchronized"),
        checkpoint=CheckpointConfig(values.get("checkpoint.tag_validation")),
        activation_checkpointing=build.activation_checkpointing(values),
        report=key_reports(values, optimizer, scheduler),
        autos=tuple(sorted(path for path, entry in values.given.items() if entry.pending)),
        _values=values,
        _given=given,
    )

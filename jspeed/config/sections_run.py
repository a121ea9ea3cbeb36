"""The typed sections that say how a run goes and what is told of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class WatchdogConfig:
    """When a run counts as standing still; a factor of 0 means never."""

    factor: float
    minimum_seconds: float
    end_after_seconds: float | None


Policy = Literal["continue", "skip", "stop", "roll_back"]


@dataclass(frozen=True, slots=True)
class AnomaliesConfig:
    """What a run does about losses and gradients that are not as they should be.

    `nonfinite` None means skip where the precision skips such steps, else stop; `max_skipped_steps`
    None means never.
    """

    nonfinite: Policy | None
    spike: Policy
    spike_factor: float
    spike_window: int
    max_roll_backs: int
    max_skipped_steps: int | None


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One training run; intervals are in optimizer steps and 0 means never."""

    dir: str
    steps: int
    seed: int
    evaluate_every: int
    evaluate_batches: int
    save_every: int
    keep_checkpoints: int | None
    log_every: int
    compile_cache: bool
    watchdog: WatchdogConfig
    anomalies: AnomaliesConfig


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What a run is planned for; None leaves the number of GPUs to the mesh."""

    gpu: str | None
    gpus: int | None
    gpus_per_host: int


@dataclass(frozen=True, slots=True)
class SweepConfig:
    """The layouts that `jspeed sweep` tries; None leaves the values to the model and devices."""

    axes: tuple[Literal["pipe", "data", "replica", "seq", "tensor"], ...] | None
    pipe: tuple[int, ...] | None
    seq: tuple[int, ...] | None
    schedules: tuple[Literal["gpipe", "1f1b", "interleaved-1f1b", "zb-h1"], ...] | None
    chunks: tuple[int, ...] | None
    replica: tuple[int, ...] | None
    tensor: tuple[int, ...] | None
    stages: tuple[int, ...]
    micro_batch_sizes: tuple[int, ...] | None
    min_micro_batch_size: int
    max_micro_batch_size: int | None
    micro_batch_count: int | None
    remat: tuple[Literal["none", "full"], ...]
    output: str | None
    top: int | None
    measure_first_step: int
    measure_last_step: int


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """One monitor; `job_name` names files, `group`, `team` and `project` are W&B's."""

    enabled: bool
    output_path: str = ""
    job_name: str = ""
    group: str | None = None
    team: str | None = None
    project: str | None = None


@dataclass(frozen=True, slots=True)
class FlopsProfilerConfig:
    """What is told of the FLOPs of one step, `profile_step`, and where; see `docs/profile.md`."""

    enabled: bool
    profile_step: int
    module_depth: int
    top_modules: int
    detailed: bool
    output_file: str | None


@dataclass(frozen=True, slots=True)
class CommsLoggerConfig:
    """What is told of a step's communication; `prof_ops` counts where `prof_all` is off."""

    enabled: bool
    prof_all: bool
    prof_ops: tuple[str, ...]
    verbose: bool
    debug: bool


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What happens when processes save under different tags."""

    tag_validation: Literal["Ignore", "Warn", "Fail"]

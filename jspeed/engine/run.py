"""From a run file to a trained model: data, model, engine and loop put together."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jspeed.checkpoint import CheckpointStore
from jspeed.checkpoint.processes import of_all_processes, of_first_process
from jspeed.config import Config
from jspeed.core.errors import CheckpointError, ConfigError
from jspeed.core.processes import restarts
from jspeed.data import TextDataset, TrainIterator, build_dataset
from jspeed.engine.abstract_run import check_attention
from jspeed.engine.anomalies import Anomalies
from jspeed.engine.compilation import enable_compile_cache
from jspeed.engine.distributed import leave
from jspeed.engine.engine import Engine, initialize
from jspeed.engine.folder import CHECKPOINTS, METRICS, claim_folder, clear_folder, failure_noted
from jspeed.engine.freezing import frozen_product_weights
from jspeed.engine.loop import Loop, LoopSettings
from jspeed.engine.memory_errors import RUNNING
from jspeed.engine.progress import Display
from jspeed.engine.reporting import LOGGER, heed_log_level
from jspeed.engine.signals import StopRequests
from jspeed.engine.status import State, Status, is_of_this_launch
from jspeed.engine.watchdog import StalledRunError, Watchdog
from jspeed.models import ModelFactory, build_model
from jspeed.monitor import Monitor, make_monitor
from jspeed.monitor.monitor import ResumePoint

if TYPE_CHECKING:
    from jspeed.config import DataConfig, ModelConfig, MonitorConfig, RunConfig

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      state: see `jspeed.engine.status`.
      step: optimizer steps taken in all.
      directory: of the run.
    """

    state: State
    step: int
    directory: Path


def run_sections(config: Config) -> tuple[ModelConfig, DataConfig, RunConfig]:
    """The sections that a run file has beside DeepSpeed's.

    Raises:
      ConfigError: one is missing.
    """
    sections = {"model": config.model, "data": config.data, "run": config.run}
    missing = [name for name, section in sections.items() if section is None]
    if config.model is None or config.data is None or config.run is None:
        raise ConfigError(
            f'"{missing[0]}": missing. A run file needs "model", "data" and "run"; without them '
            "the file configures jspeed.initialize."
        )
    return config.model, config.data, config.run


def cache_directory() -> Path:
    """Where tokenized data are kept: `jspeed` under `XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jspeed"


def load_data(config: Config) -> TextDataset:
    """The data set of a run file."""
    model, data, run = run_sections(config)
    return build_dataset(
        source=data.source,
        format=data.format,
        text_key=data.text_key,
        tokenizer_kind=data.tokenizer.kind,
        vocab_size=data.tokenizer.vocab_size or 0,
        tokenizer_path=data.tokenizer.path,
        sequence_length=data.sequence_length,
        validation_fraction=data.validation_fraction,
        document_mask=data.document_mask,
        shuffle=data.shuffle,
        seed=run.seed if data.seed is None else data.seed,
        token_dtype=data.dtype,
        masked=model.traits.masked,
        cache_dir=cache_directory() / "data",
    )


def train_run(
    config: Config,
    *,
    display: Display,
    resume: bool,
    overwrite: bool,
    terminated: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Trains as a run file says; SIGTERM is heeded from the first line on.

    Args:
      config: a complete run file.
      display: where progress goes.
      resume: continue from the latest checkpoint, if there is one.
      overwrite: start anew where an earlier run left files, which are removed once data and model
        are made.
      terminated: whether SIGTERM came before; asked once SIGTERM is heeded here.

    Raises:
      JspeedError: what is wrong and what to do; an earlier run's metrics and checkpoints are
        untouched, and `status.json` says `failed`, unless the folder was not this run's to change.
    """

    def before() -> signal.Signals | None:
        return signal.SIGTERM if terminated() else None

    with StopRequests((signal.SIGTERM,), earlier=before) as early:
        return _train_run(config, display, early, resume=resume, overwrite=overwrite)


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    engine: Engine
    factory: ModelFactory
    data: TextDataset
    batches: TrainIterator
    settings: LoopSettings
    anomalies: Anomalies


def _train_run(
    config: Config, display: Display, early: StopRequests, *, resume: bool, overwrite: bool
) -> RunResult:
    run = run_sections(config)[2]
    directory = Path(run.dir)
    if restarts() and of_all_processes(int(is_of_this_launch(directory)))[0]:
        resume, overwrite = True, False  # whatever the first start was told is done
    earlier = claim_folder(directory, resume=resume, overwrite=overwrite)
    heed_log_level(config)
    reached = earlier.step if earlier is not None and resume else 0
    # A run that is to be replaced stays what it is until its successor is made.
    unnoted = overwrite and earlier is not None
    with nullcontext() if unnoted else failure_noted(directory, run.steps, lambda: reached):
        parts = make_parts(config, display.say, resume=resume)
        if resume:
            _resume(parts, display)
    engine = parts.engine
    with failure_noted(directory, run.steps, lambda: engine.global_steps):
        if overwrite and jax.process_index() == 0:
            clear_folder(directory)
        engine.say = display.say
        display.say(_summary(engine, parts.factory, parts.data))
        if config.dump_state:
            display.say(json.dumps(engine.config.to_dict(), indent=2))
        if engine.global_steps >= run.steps:
            if jax.process_index() == 0:
                Status("finished", engine.global_steps, run.steps).write(directory)
            display.say(f"nothing to do: {engine.global_steps} of {run.steps} steps are done.")
            return RunResult("finished", engine.global_steps, directory)
        with (
            _monitor(engine, directory) as monitor,
            _watchdog(engine, run) as watchdog,
            display,
            # Metrics are read after their step was dispatched, and so are its errors.
            engine.out_of_memory_explained(RUNNING),
        ):
            state = Loop(
                engine=engine,
                batches=parts.batches,
                evaluation=lambda: _evaluation(engine, parts.data, run.evaluate_batches),
                monitor=monitor,
                display=display,
                settings=parts.settings,
                watchdog=watchdog,
                anomalies=parts.anomalies,
                files={_TOKENIZER: _tokenizer_bytes(parts.data, directory)},
                earlier=lambda: early.requested,
            ).run()
            engine.tell_at_end()
    return RunResult(state, engine.global_steps, directory)


def make_parts(config: Config, say: Callable[[str], None], *, resume: bool) -> Parts:
    """Makes data, model and engine of a run file.

    Args:
      config: a complete run file.
      say: takes lines for people.
      resume: a checkpoint, where there is one, will replace the weights.
    """
    model, _, run = run_sections(config)
    platform = jax.devices()[0].platform
    check_attention(config, platform)
    if run.compile_cache:
        enable_compile_cache()
    data = load_data(config)
    factory = build_model(model, vocab_size=data.vocab_size, platform=platform)
    if resume and not CheckpointStore(Path(run.dir) / CHECKPOINTS).is_empty():
        factory = replace(factory, read_weights=False)  # they would be replaced at once
    engine = initialize(
        model=factory,
        loss_fn=factory.loss_fn,
        config=config,
        seed=run.seed,
        report=False,
    )
    share = engine.data_share
    rows = engine.train_batch_size() // share.count
    batches = data.train_iterator(rows, share.index, share.count)
    settings = _loop_settings(engine, factory, data)
    anomalies = Anomalies(
        run_sections(engine.config)[2].anomalies,
        parameters=engine.layout.trained,
        skips_nonfinite=engine.plan.step.skip_nonfinite,
        scaled=engine.plan.step.scales,
        say=say,
    )
    return Parts(engine, factory, data, batches, settings, anomalies)


def _resume(parts: Parts, display: Display) -> None:
    """Takes up the latest checkpoint, if there is one."""
    folder = parts.settings.checkpoints
    store = CheckpointStore(folder)
    if of_first_process("empty" if store.is_empty() else ""):
        return
    tag, client = parts.engine.load_checkpoint(folder)
    store.make_latest(tag)
    if "data" not in client:
        raise CheckpointError(
            f'Checkpoint "{tag}" in "{folder}" does not say how far the data were read: its '
            'client_state has no "data", so it is not from `jspeed train`. Continue it with '
            "jspeed.initialize and engine.load_checkpoint, or train into another folder with "
            "--set run.dir=FOLDER."
        )
    parts.batches.restore(client["data"])
    parts.anomalies.restore(client.get("anomalies", {}))
    display.say(f"resumed from {tag} in {folder}")


def _loop_settings(engine: Engine, factory: ModelFactory, data: TextDataset) -> LoopSettings:
    run = engine.config.run
    assert run is not None
    tokens = engine.train_batch_size() * data.sequence_length
    frozen = frozen_product_weights(engine.layout)
    return LoopSettings(
        directory=Path(run.dir),
        steps=run.steps,
        evaluate_every=run.evaluate_every,
        save_every=run.save_every,
        keep_checkpoints=run.keep_checkpoints,
        tokens_per_step=tokens,
        flops_per_step=tokens * factory.flops_per_token(data.sequence_length, frozen),
        breakdown=engine.config.wall_clock_breakdown,
    )


def _summary(engine: Engine, factory: ModelFactory, data: TextDataset) -> str:
    batch = engine.plan.batch
    parameters = sum(math.prod(leaf.shape) for leaf in engine.layout.leaves.values())
    return (
        f"{factory.family}, {parameters:,} parameters in "
        f"{engine.layout.compute_dtype}; {data.tokens:,} tokens of text; ZeRO stage "
        f"{engine.layout.stage} on {engine.world_size} {jax.devices()[0].device_kind} device(s); "
        f"batch {batch.train_batch_size} = {batch.micro_batch_size} per device x "
        f"{batch.accumulation} microbatch(es) x {engine.layout.batch_shards} shard(s)"
    )


def _monitor(engine: Engine, directory: Path) -> Monitor:
    if jax.process_index() != 0:
        return Monitor()
    config, start = engine.config, engine.global_steps

    def placed(section: MonitorConfig) -> MonitorConfig:
        return replace(section, output_path=section.output_path or str(directory))

    return make_monitor(
        metrics_path=directory / METRICS,
        tensorboard=placed(config.tensorboard),
        csv_monitor=placed(config.csv_monitor),
        wandb=config.wandb,
        resume=ResumePoint(first_step=start + 1, samples=engine.global_samples),
    )


def _watchdog(engine: Engine, run: RunConfig) -> Watchdog:
    def end(error: StalledRunError) -> None:
        if jax.process_index() == 0:
            with suppress(OSError):
                status = Status("failed", engine.global_steps, run.steps, str(error))
                status.write(Path(run.dir))
        LOGGER.error("%s", error)
        leave(1, error)

    return Watchdog(
        run.watchdog,
        Path(run.dir),
        process=jax.process_index(),
        processes=jax.process_count(),
        end=end,
    )


def _evaluation(engine: Engine, data: TextDataset, limit: int) -> Any:
    rows = engine.train_micro_batch_size_per_gpu() * engine.layout.batch_shards
    stages = engine.layout.stages
    if stages > 1:  # enough microbatches at once for every stage to have one
        rows *= min(engine.gradient_accumulation_steps(), 4 * stages)
    share = engine.data_share
    return data.validation_batches(rows // share.count, limit, share.index, share.count)


def _tokenizer_bytes(data: TextDataset, directory: Path) -> bytes:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _TOKENIZER
    data.tokenizer.save(path)
    return path.read_bytes()

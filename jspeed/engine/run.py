"""From a run file to a trained model: data, model, engine and loop put together."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jspeed.config import Config
from jspeed.core.errors import CheckpointError, ConfigError
from jspeed.core.tree import count_parameters
from jspeed.data import TextDataset, build_dataset
from jspeed.engine.compilation import enable_compile_cache
from jspeed.engine.engine import Engine, initialize
from jspeed.engine.loop import Loop, LoopSettings
from jspeed.engine.progress import Display
from jspeed.engine.signals import StopRequests
from jspeed.engine.status import State, Status, read_status
from jspeed.models import ModelFactory, build_model
from jspeed.monitor import Monitor, make_monitor
from jspeed.monitor.monitor import ResumePoint
from jspeed.nn import language_model_loss

if TYPE_CHECKING:
    from jspeed.config import DataConfig, ModelConfig, RunConfig

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
            "the "
            "file configures jspeed.initialize."
        )
    return config.model, config.data, config.run


def cache_directory() -> Path:
    """Where tokenized data are kept: `jspeed` under `XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jspeed"


def load_data(config: Config) -> TextDataset:
    """The data set of a run file."""
    _, data, run = run_sections(config)
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
        cache_dir=cache_directory() / "data",
    )


def train_run(config: Config, *, display: Display, resume: bool, overwrite: bool) -> RunResult:
    """Trains as a run file says; SIGTERM is heeded from the first line on.

    Args:
      config: a complete run file.
      display: where progress goes.
      resume: continue from the latest checkpoint, if there is one.
      overwrite: start anew where an earlier run left checkpoints.

    Raises:
      JspeedError: what is wrong and what to do; an earlier run's files are untouched.
    """
    with StopRequests((signal.SIGTERM,)) as early:
        return _train_run(config, display, early, resume=resume, overwrite=overwrite)


def _train_run(
    config: Config, display: Display, early: StopRequests, *, resume: bool, overwrite: bool
) -> RunResult:
    model, _, run = run_sections(config)
    directory = Path(run.dir)
    _check_earlier_run(directory, resume=resume, overwrite=overwrite)
    if run.compile_cache:
        enable_compile_cache()
    data = load_data(config)
    factory = build_model(
        model, vocab_size=data.tokenizer.vocab_size, platform=jax.devices()[0].platform
    )
    engine = initialize(
        model=factory,
        loss_fn=language_model_loss,
        config=config,
        seed=run.seed,
        report=False,
    )
    rows = engine.train_batch_size() // jax.process_count()
    batches = data.train_iterator(rows, jax.process_index(), jax.process_count())
    settings = _loop_settings(engine, factory, data)
    if resume and engine.latest_checkpoint(settings.checkpoints) is not None:
        tag, client = engine.load_checkpoint(settings.checkpoints)
        batches.restore(client["data"])
        display.say(f"resumed from {tag} in {settings.checkpoints}")
    display.say(_summary(engine, factory, data))
    if config.dump_state:
        display.say(json.dumps(engine.config.to_dict(), indent=2))
    if engine.global_steps >= run.steps:
        Status("finished", engine.global_steps, run.steps).write(directory)
        display.say(f"nothing to do: {engine.global_steps} of {run.steps} steps are done.")
        return RunResult("finished", engine.global_steps, directory)
    with _monitor(engine, directory) as monitor, display:
        loop = Loop(
            engine=engine,
            batches=batches,
            evaluation=lambda: _evaluation(engine, data, run.evaluate_batches),
            monitor=monitor,
            display=display,
            settings=settings,
            files={_TOKENIZER: _tokenizer_bytes(data, directory)},
            requested=early.requested,
        )
        try:
            state = loop.run()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            Status("failed", engine.global_steps, run.steps, reason).write(directory)
            raise
    return RunResult(state, engine.global_steps, directory)


def _check_earlier_run(directory: Path, *, resume: bool, overwrite: bool) -> None:
    earlier = read_status(directory)
    if earlier is None or resume or overwrite or earlier.step == 0:
        return
    raise CheckpointError(
        f'"run.dir": {directory} holds a run that is {earlier.status} at step {earlier.step}. '
        "Continue it with --resume, replace it with --overwrite, or choose another folder with "
        "--set run.dir=FOLDER."
    )


def _loop_settings(engine: Engine, factory: ModelFactory, data: TextDataset) -> LoopSettings:
    run = engine.config.run
    assert run is not None
    tokens = engine.train_batch_size() * data.sequence_length
    return LoopSettings(
        directory=Path(run.dir),
        steps=run.steps,
        evaluate_every=run.evaluate_every,
        save_every=run.save_every,
        keep_checkpoints=run.keep_checkpoints,
        tokens_per_step=tokens,
        flops_per_step=tokens * factory.flops_per_token(data.sequence_length),
        breakdown=engine.config.wall_clock_breakdown,
    )


def _summary(engine: Engine, factory: ModelFactory, data: TextDataset) -> str:
    batch = engine.plan.batch
    return (
        f"{factory.family}, {count_parameters(engine.state.master):,} parameters in "
        f"{engine.layout.compute_dtype}; {data.tokens:,} tokens of text; ZeRO stage "
        f"{engine.layout.stage} on {engine.world_size} {jax.devices()[0].device_kind} device(s); "
        f"batch {batch.train_batch_size} = {batch.micro_batch_size} per device x "
        f"{batch.accumulation} microbatch(es) x {engine.layout.batch_shards} shard(s)"
    )


def _monitor(engine: Engine, directory: Path) -> Monitor:
    if jax.process_index() != 0:
        return Monitor()
    config, start = engine.config, engine.global_steps
    return make_monitor(
        metrics_path=directory / "metrics.jsonl",
        tensorboard=config.tensorboard,
        csv_monitor=config.csv_monitor,
        wandb=config.wandb,
        resume=ResumePoint(first_step=start + 1, samples=start * engine.train_batch_size()),
    )


def _evaluation(engine: Engine, data: TextDataset, limit: int) -> Any:
    rows = engine.train_micro_batch_size_per_gpu() * engine.layout.batch_shards
    count = jax.process_count()
    return data.validation_batches(rows // count, limit, jax.process_index(), count)


def _tokenizer_bytes(data: TextDataset, directory: Path) -> bytes:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _TOKENIZER
    data.tokenizer.save(path)
    return path.read_bytes()

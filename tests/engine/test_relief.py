"""What an out-of-memory error advises can be done as it says, and leaves the training as it is."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.engine import out_of_memory
from jspeed.engine.abstract_run import model_factory
from jspeed.engine.build import RunPlan, mesh_shape, plan_run
from jspeed.engine.relief import Given, Relief, reliefs
from jspeed.layout.mesh import make_abstract_mesh
from jspeed.profile.memory import ACTIVATIONS, Buffer
from jspeed.training.program import make_program
from tests.engine.engines import make_engine
from tests.engine.test_out_of_memory import SAID, batch_of, exhausted, told

GIB = 2**30
TRAIN, MICRO = "train_batch_size", "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
RUN: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "bf16": {"enabled": True},
    "model": {
        "family": "gpt2",
        "layers": 2,
        "hidden_size": 32,
        "heads": 2,
        "sequence_length": 16,
        "vocab_size": 64,
    },
}
ELASTIC = {"enabled": True, "max_train_batch_size": 32, "micro_batch_sizes": [2, 4], "version": 0.1}
ADAM = RUN["optimizer"]


def planned(run: dict[str, Any], devices: int, overrides: tuple[str, ...] = ()) -> Given:
    config = load_config(run, overrides=overrides)
    program = make_program(model_factory(config, platform="cpu", remarks=[]))
    plan = plan_run(config, program, make_abstract_mesh(mesh_shape(config, devices)))
    return Given(config, program, plan)


def offered(run: dict[str, Any], devices: int, key: str) -> Relief:
    held = [Buffer(GIB, ACTIVATIONS, "", "")]
    found = reliefs(planned(run, devices), held, platform="cpu", sequence=16, missing=1)
    return next(relief for relief in found if key in relief.keys)


def followed(run: dict[str, Any], devices: int, relief: Relief) -> RunPlan:
    overrides = tuple(f"{path}={json.dumps(value)}" for path, value in relief.keys.items())
    return planned(run, devices, overrides).plan


@pytest.mark.parametrize(
    ("sizes", "advised"),
    [
        ({MICRO: 4, ACCUMULATION: 2}, {MICRO: 2, ACCUMULATION: 4}),
        ({MICRO: 4}, {MICRO: 2, ACCUMULATION: 2}),
        ({TRAIN: 16, MICRO: 4, ACCUMULATION: 2}, {MICRO: 2, ACCUMULATION: 4}),
        ({TRAIN: 16, ACCUMULATION: 2}, {MICRO: 2, ACCUMULATION: 4}),
        ({TRAIN: 16, MICRO: 4}, {MICRO: 2}),
    ],
)
def test_fewer_rows_at_once_keep_the_global_batch(
    sizes: dict[str, int], advised: dict[str, int]
) -> None:
    run = {**RUN, **sizes}
    relief = offered(run, 2, MICRO)
    assert relief.keys == advised
    before, after = planned(run, 2).plan.batch, followed(run, 2, relief).batch
    assert (after.train_batch_size, after.micro_batch_size) == (before.train_batch_size, 2)
    assert str(relief).startswith(f'"{MICRO}": 2')
    assert str(relief).endswith("4 and 2" if sizes.get(ACCUMULATION) else relief.instead)


@pytest.mark.parametrize(
    "sizes",
    [
        {MICRO: 1, ACCUMULATION: 2},
        {MICRO: 1},
        {TRAIN: 4, MICRO: 1, ACCUMULATION: 2},
        {TRAIN: 2},
        {TRAIN: 4, MICRO: 1},
    ],
)
def test_split_sequences_keep_the_global_batch(sizes: dict[str, int]) -> None:
    run = {**RUN, **sizes}
    relief = offered(run, 2, "mesh.seq")
    before, after = planned(run, 2).plan, followed(run, 2, relief)
    assert after.layout.sizes["seq"] == 2
    assert after.batch.train_batch_size == before.batch.train_batch_size
    assert after.batch.micro_batch_size == 1


def test_elastic_runs_are_told_of_their_own_sizes() -> None:
    run = {**RUN, "elasticity": ELASTIC}
    relief = offered(run, 2, "elasticity.micro_batch_sizes")
    assert str(relief) == '"elasticity.micro_batch_sizes": [2] instead of [2, 4]'
    before, after = planned(run, 2).plan.batch, followed(run, 2, relief).batch
    assert before.micro_batch_size == 4
    assert (after.train_batch_size, after.micro_batch_size) == (before.train_batch_size, 2)


def test_elastic_engines_say_that_memory_ran_out() -> None:
    run = {"optimizer": ADAM, "bf16": {"enabled": True}, "elasticity": ELASTIC}
    engine = make_engine(run, devices=2)
    batch = batch_of(engine)
    engine.train_step = exhausted
    lines, _ = told(lambda: engine.train_batch(batch))
    assert lines[0].startswith("Out of memory while running the training step: 6.0 GiB")
    assert any('"elasticity.micro_batch_sizes": [2] instead of [2, 4]' in line for line in lines)
    assert not any(MICRO in line for line in lines)


def test_what_fails_while_explaining_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of the explanation")

    engine = make_engine()
    batch = batch_of(engine)
    engine.train_step = exhausted
    monkeypatch.setattr(out_of_memory, "reliefs", broken)
    with caplog.at_level(logging.WARNING, logger="jspeed"):
        lines, _ = told(lambda: engine.train_batch(batch))
    assert lines == [
        "Out of memory: 6.0 GiB in one piece could not be had.",
        f"XLA said: {SAID}",
    ]
    assert any("ZeroDivisionError: of the explanation" in message for message in caplog.messages)

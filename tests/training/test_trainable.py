"""Frozen parameters: no gradients, no optimizer state, and the curve of an optimizer that leaves
them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jspeed
from jspeed.core.errors import CheckpointError, ConfigError
from jspeed.core.tree import map_named, named_leaves
from jspeed.engine.engine import Engine
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import BATCH, TINY, batches, ds_config

STEPS = 8
TRAINED = ["blocks/attn/.*", "ln_f/.*"]
BF16: dict[str, Any] = {"bf16": {"enabled": True}}


def is_trained(path: str) -> bool:
    return path.startswith(("blocks/attn/", "ln_f/"))


def make(
    *, devices: int = 8, stage: int = 3, optimizer: Any = None, zero: Any = None, **more: Any
) -> Engine:
    mesh = more.get("mesh", {})
    shards = devices // mesh.get("tensor", 1) // mesh.get("pipe", 1) // mesh.get("seq", 1)
    config = ds_config(stage=stage, micro=BATCH // shards // (4 if shards < 8 else 1))
    config["gradient_clipping"] = 0.0
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
    config["zero_optimization"] |= zero or {}
    return jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=config | more,
        optimizer=optimizer,
        devices=jax.devices()[:devices],
        seed=0,
        report=False,
    )


def losses(engine: Engine, steps: int = STEPS) -> list[float]:
    return [float(engine.train_batch(batch)["loss"]) for batch in batches(steps)]


@pytest.fixture(scope="module")
def reference() -> list[float]:
    """Of one device, where optax gives frozen parameters no update."""

    def labels(params: Any) -> Any:
        return map_named(lambda path, _: "trained" if is_trained(path) else "frozen", params)

    rule = optax.multi_transform(
        {"trained": optax.adamw(1e-2, weight_decay=0.1), "frozen": optax.set_to_zero()}, labels
    )
    return losses(make(devices=1, stage=0, optimizer=rule))


LAYOUTS: list[dict[str, Any]] = [
    {"devices": 1, "stage": 0},
    {"devices": 8, "stage": 0},
    {"devices": 8, "stage": 1},
    {"devices": 8, "stage": 2},
    {"devices": 8, "stage": 3},
    {"devices": 8, "stage": 3, "mesh": {"tensor": 2}},
    {"devices": 8, "stage": 2, "mesh": {"tensor": 2, "seq": 2}},
    {"devices": 8, "stage": 1, "mesh": {"pipe": 2}},
    {"devices": 4, "stage": 3, "mesh": {"pipe": 2}},
    {"devices": 8, "stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
    {
        "devices": 8,
        "stage": 3,
        "zero": {"offload_optimizer": {"device": "cpu", "update": "device"}},
    },
]
QUICK = (4,)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[] if n in QUICK else pytest.mark.slow)
        for n, layout in enumerate(LAYOUTS)
    ],
    ids=str,
)
def test_any_layout_has_the_curve_of_an_optimizer_that_leaves_them_alone(
    layout: dict[str, Any], reference: list[float]
) -> None:
    engine = make(**layout, trainable=TRAINED)
    before = engine.parameters()
    np.testing.assert_allclose(losses(engine), reference, rtol=1e-6)
    for path, after in engine.parameters().items():
        assert np.array_equal(before[path], after) != is_trained(path), path


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_what_is_frozen_costs_its_own_bytes_alone(stage: int) -> None:
    engine = make(stage=stage, trainable=TRAINED, **BF16)
    frozen = {path for path, _ in named_leaves(engine.state.master) if not is_trained(path)}
    assert engine.layout.frozen == frozen
    for path, leaf in named_leaves(engine.state.master):
        assert leaf.dtype == ("bfloat16" if path in frozen else "float32"), path
    assert not frozen & set(engine.state.copies)
    for path, leaf in named_leaves(engine.state.opt_state):
        assert engine.layout.owner(path, leaf.shape) not in frozen, path
    assert len(named_leaves(engine.state.opt_state)) >= 2 * (
        len(engine.layout.leaves) - len(frozen)
    )


def test_others_get_what_is_frozen_as_all_else(tmp_path: Path) -> None:
    """The module in fp32, files in 16 bits."""
    engine = make(stage=2, trainable=TRAINED, **BF16)
    wte = np.asarray(engine.state.master["wte"])
    assert wte.dtype == "bfloat16"
    held = named_leaves(nnx.to_pure_dict(nnx.state(engine.module, nnx.Param)))
    whole = engine.parameters()
    assert {str(leaf.dtype) for _, leaf in held} == {"float32"}
    for path, leaf in held:
        np.testing.assert_array_equal(np.asarray(leaf), whole[path], err_msg=path)
    np.testing.assert_array_equal(whole["wte"], wte.astype(np.float32))
    written = load_file(engine.save_16bit_model(tmp_path))
    engine.model_factory = ModelFactory("gpt2", TINY, sequence_length=TINY.sequence_length)
    engine.save_hf_model(tmp_path / "hf")
    exported = load_file(tmp_path / "hf/model.safetensors")
    for found in (written["wte"], exported["transformer.wte.weight"]):
        np.testing.assert_array_equal(found, wte)


def flops(trainable: list[str] | None) -> float:
    engine = make(devices=1, stage=0, trainable=trainable)
    (batch,) = batches(1)
    lowered = engine.train_step.lower(engine.state, engine.place_batch(batch))
    analysis: Any = lowered.compile().cost_analysis()
    return analysis["flops"]


def test_gradients_of_what_is_frozen_are_not_computed() -> None:
    """Matrices of layers cost as much again for their gradients; below the first that is trained
    nothing goes backward."""
    whole = flops(None)
    assert flops(TRAINED) < 0.9 * whole
    assert flops(["ln_f/.*"]) < 0.6 * whole


def test_a_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    """Frozen parameters are in the checkpoint as all others, in fp32."""
    data = batches(6)
    engine = make(trainable=TRAINED, **BF16)
    for batch in data[:3]:
        engine.train_batch(batch)
    engine.save_checkpoint(tmp_path, wait=True)
    after = [float(engine.train_batch(batch)["loss"]) for batch in data[3:]]
    same = make(trainable=TRAINED, **BF16)
    same.load_checkpoint(tmp_path)
    assert [float(same.train_batch(batch)["loss"]) for batch in data[3:]] == after
    one = make(stage=1, trainable=TRAINED, **BF16)
    one.load_checkpoint(tmp_path)
    found = float(one.train_batch(data[3])["loss"])
    np.testing.assert_allclose(found, after[0], rtol=2e-3)  # other sums, in bf16

    everything, frozen = make(**BF16), make(trainable=TRAINED, **BF16)
    everything.load_checkpoint(tmp_path, load_module_only=True)
    frozen.load_checkpoint(tmp_path)
    expected = frozen.parameters()
    for path, value in everything.parameters().items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_what_was_trained_can_be_frozen_and_the_reverse_is_told(tmp_path: Path) -> None:
    whole = make()
    losses(whole, 2)
    whole.save_checkpoint(tmp_path / "whole", wait=True)
    frozen = make(trainable=TRAINED)
    frozen.load_checkpoint(tmp_path / "whole")
    for path, value in frozen.parameters().items():
        np.testing.assert_array_equal(value, whole.parameters()[path], err_msg=path)
    frozen.save_checkpoint(tmp_path / "frozen", wait=True)
    with pytest.raises(CheckpointError, match="opt_state"):
        make().load_checkpoint(tmp_path / "frozen")


def test_the_first_bad_parameter_is_one_that_is_trained(tmp_path: Path) -> None:
    engine = make(trainable=TRAINED, run={"dir": str(tmp_path), "steps": 1})
    assert engine.layout.trained == tuple(filter(is_trained, engine.layout.leaves))
    explained = {leaf.path: leaf.rule for leaf in engine.explain().leaves}
    assert "frozen" in explained["wte"]
    assert "frozen" not in explained["ln_f/scale"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["blocks"], r'"trainable": \'blocks\' matches no parameter'),
        ([], r'"trainable": \[\] freezes every parameter'),
        (["("], r"the regex '\(' does not compile"),
        (3, r'"trainable": 3'),
    ],
)
def test_wrong_patterns(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(trainable=given)


def test_layers_in_host_memory_are_all_trained() -> None:
    zero = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ConfigError, match='"trainable"'):
        make(trainable=TRAINED, zero=zero)

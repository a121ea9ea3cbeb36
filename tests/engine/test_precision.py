"""bf16 and fp16: close to fp32, overflow skipped and reported, state bytes as promised."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import jspeed
from jspeed.core.errors import ModelError
from jspeed.core.tree import named_leaves
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.engine.loops import FactorBatches, Lines, factored_loss, make_loop, with_factor
from tests.engine.runs import losses, start
from tests.training.curves import TINY, batches, ds_config

DYNAMIC = {"enabled": True, "initial_scale_power": 16, "hysteresis": 1}


def make_engine(config, devices=8, loss_fn=language_model_loss):
    return jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=loss_fn,
        config=config,
        devices=jax.devices()[:devices],
    )


@pytest.fixture(scope="module")
def fp32_loss() -> float:
    return _final_loss({})


def _final_loss(precision, stage=1) -> float:
    engine = make_engine(ds_config(stage=stage, micro=4, optimizer="AdamW", **precision), devices=2)
    losses = [engine.train_batch(batch)["loss"] for batch in batches(200)]
    return float(np.mean([float(loss) for loss in losses[-20:]]))


@pytest.mark.parametrize(
    "precision",
    [
        {"bf16": {"enabled": True}},
        {"fp16": DYNAMIC},
        {"fp16": {"enabled": True, "loss_scale": 128}},
    ],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_half_precision_learns_as_fp32(precision, stage, fp32_loss):
    """The mean of the last 20 of 200 losses; the model has learnt most of what there is by then."""
    assert fp32_loss < 2.0
    assert _final_loss(precision, stage) == pytest.approx(fp32_loss, rel=0.02)


CONFIGS = Path(__file__).parent.parent.parent / "configs"
FP16 = ("bf16.enabled=false", "fp16.enabled=true")


@pytest.fixture(scope="module")
def shipped_fp32_loss(tmp_path_factory) -> float:
    return _shipped_loss(tmp_path_factory.mktemp("fp32"), "bf16.enabled=false")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("bf16.enabled=true",),
        FP16,
        (*FP16, "fp16.loss_scale=1024"),
    ],
)
def test_the_shipped_run_learns_as_in_fp32(changes, shipped_fp32_loss, tmp_path):
    """All 200 steps of `configs/gpt2_tiny.json` on real text, as `jspeed train` runs them."""
    assert shipped_fp32_loss < 6.0
    assert _shipped_loss(tmp_path, *changes) == pytest.approx(shipped_fp32_loss, rel=0.02)


def _shipped_loss(directory: Path, *changes: str) -> float:
    """The mean of the last 20 training losses."""
    settings = [f"run.dir={directory / 'run'}", *changes]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    process = start(CONFIGS / "gpt2_tiny.json", *arguments)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    curve = losses(directory / "run")
    assert sorted(curve) == list(range(1, 201))
    return float(np.mean([curve[step] for step in range(181, 201)]))


def test_overflow_skips_and_halves():
    engine = make_engine(
        ds_config(stage=3, micro=2, optimizer="AdamW", fp16=DYNAMIC), loss_fn=factored_loss
    )
    good, bad = (with_factor(batches(1)[0], factor) for factor in (1.0, 1e30))
    engine.train_batch(good)
    before = engine.parameters()
    moments = jax.tree.map(np.asarray, engine.state.opt_state)
    rate = engine.get_lr()
    metrics = engine.train_batch(bad)
    assert not bool(metrics["finite"])
    assert engine.loss_scale() == 2.0**15
    assert engine.skipped_steps == 1
    assert engine.global_steps == 2
    assert not engine.was_step_applied()
    assert engine.get_lr() == rate
    after = engine.parameters()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    jax.tree.map(np.testing.assert_array_equal, moments, engine.state.opt_state)
    engine.train_batch(good)
    assert engine.was_step_applied()
    assert engine.skipped_steps == 1
    assert any(not np.array_equal(before[p], v) for p, v in engine.parameters().items())


def test_loop_names_the_first_nonfinite_parameter(tmp_path):
    config = ds_config(stage=1, micro=2, fp16=DYNAMIC)
    engine = make_engine(config, loss_fn=factored_loss)
    display = Lines()
    data = FactorBatches([1.0, 1e30, 1.0])
    state = make_loop(engine, data, tmp_path, display=display, steps=3).run()
    assert state == "finished"
    first = named_leaves(engine.state.master)[0][0]
    assert display.lines == [
        f"step 2: the gradient of {first} is not finite; loss scale 65536 -> 32768; "
        "the step is skipped."
    ]


def test_overflow_at_the_smallest_scale_ends_the_run(tmp_path):
    smallest = {**DYNAMIC, "initial_scale_power": 1, "min_loss_scale": 2}
    config = ds_config(stage=1, micro=2, fp16=smallest)
    engine = make_engine(config, loss_fn=factored_loss)
    with pytest.raises(ModelError, match=r"step 2: gradients overflow although the loss scale is"):
        make_loop(engine, FactorBatches([1.0, 1e30, 1.0]), tmp_path, steps=3).run()


PSI_BYTES = {0: lambda psi, n: 14 * psi, 1: lambda psi, n: 2 * psi + 12 * psi / n}
PSI_BYTES[2] = PSI_BYTES[1]
PSI_BYTES[3] = lambda psi, n: 12 * psi / n


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_bytes_per_device(stage):
    """bf16 with Adam: 14P, 2P + 12P/N twice, 12P/N (Rajbhandari et al., 2020, figure 1)."""
    engine = make_engine(
        ds_config(stage=stage, micro=2, optimizer="AdamW", bf16={"enabled": True}), devices=8
    )
    state = engine.state
    arrays = jax.tree.leaves((state.master, state.copies, state.opt_state))
    device = jax.devices()[0]
    used = sum(
        shard.data.nbytes
        for array in arrays
        for shard in array.addressable_shards
        if shard.device == device
    )
    psi = sum(leaf.size for leaf in jax.tree.leaves(state.master))
    assert used == pytest.approx(PSI_BYTES[stage](psi, 8), rel=0.01)

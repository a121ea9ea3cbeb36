"""`offload_states` and `reload_states`: where the state is, that it is the same, and what refuses
to compute without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jspeed
from jspeed.core.errors import OffloadError
from jspeed.engine.engine import Engine
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import TINY, batches, ds_config


def make_engine() -> Engine:
    return jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=ds_config(stage=1, micro=4, optimizer="AdamW", bf16={"enabled": True}),
        devices=jax.devices()[:4],
        report=False,
    )


def kinds(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def test_it_leaves_the_devices_and_comes_back_the_same():
    engine, (first, second) = make_engine(), batches(2)
    engine.train_batch(first)
    before = jax.tree.map(np.asarray, (engine.state.master, engine.state.opt_state))
    engine.offload_states()
    state = engine.state
    assert kinds((state.master, state.opt_state, state.copies)) == {"pinned_host"}
    assert engine.global_steps == 1
    with pytest.raises(OffloadError, match=r"master, opt_state.*engine.reload_states\(\) first"):
        engine.train_batch(second)
    with pytest.raises(OffloadError, match="reload_states"):
        engine.eval_batch(second)
    engine.reload_states()
    assert kinds(engine.state) == {"device"}
    jax.tree.map(
        np.testing.assert_array_equal, before, (engine.state.master, engine.state.opt_state)
    )
    other = make_engine()
    losses = [float(other.train_batch(batch)["loss"]) for batch in (first, second)]
    assert float(engine.train_batch(second)["loss"]) == losses[1]


def test_parts_of_it_move_and_are_saved_meanwhile(tmp_path: Path):
    engine, (first, second) = make_engine(), batches(2)
    engine.train_batch(first)
    engine.offload_states(include=["optim_states", "lp_grads"], pin_memory=False)
    assert kinds(engine.state.opt_state) == {"unpinned_host"}
    assert kinds((engine.state.master, engine.state.copies)) == {"device"}
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    engine.load_checkpoint(tmp_path)  # onto the devices
    assert kinds(engine.state) == {"device"}
    assert np.isfinite(float(engine.train_batch(second)["loss"]))


def test_what_a_checkpoint_leaves_as_it_is_comes_back_with_the_rest(tmp_path: Path):
    engine = make_engine()
    engine.save_checkpoint(tmp_path, wait=True)
    engine.offload_states()
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert kinds(engine.state) == {"device"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"include": ["optimizer"]}, "include has 'optimizer'; expected of: optim_states"),
        ({"device": "nvme"}, "device is 'nvme'; expected \"cpu\""),
    ],
)
def test_what_does_not_exist_is_named(arguments, said):
    engine = make_engine()
    with pytest.raises(OffloadError, match=said):
        engine.offload_states(**arguments)
    assert kinds(engine.state) == {"device"}

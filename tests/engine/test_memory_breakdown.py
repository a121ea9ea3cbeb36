"""`memory_breakdown` in the log: the state by role is that of the arrays."""

from __future__ import annotations

import logging
import re

import jax
import numpy as np
import pytest

from jspeed.core.units import bytes_text
from jspeed.engine.memory_breakdown import _bytes_on, state_on
from jspeed.engine.state_explanation import explain_plan
from jspeed.layout.zero import Role
from tests.engine.engines import make_engine
from tests.training.curves import TINY, ds_config


def test_the_state_by_role_around_each_step(caplog: pytest.LogCaptureFixture) -> None:
    config = ds_config(
        stage=2, micro=4, optimizer="AdamW", bf16={"enabled": True}, memory_breakdown=True
    )
    with caplog.at_level(logging.INFO, logger="jspeed"):
        engine = make_engine(config, devices=4)
        tokens = np.zeros((engine.train_batch_size(), 17), np.int32)
        batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
        engine.train_batch(batch)
        engine.eval_batch(batch)
    lines = [line for line in caplog.messages if line.startswith("memory ")]
    assert [line.partition(":")[0] for line in lines] == [
        "memory with the engine made",
        "memory before step 1",
        "memory after step 1",
        "memory before an evaluation after step 1",
        "memory after an evaluation after step 1",
    ]
    held = state_on(jax.devices()[0], engine.state, engine.layout)
    count = sum(leaf.size for leaf in jax.tree.leaves(engine.state.master))
    assert TINY.layers == 2
    for line in lines:
        # Copies in bf16 whole; fp32 masters and two moments of a quarter each.
        assert f"parameters {bytes_text(2 * count)}" in line
        assert f"master weights {bytes_text(count)}" in line
        assert f"optimizer moments {bytes_text(2 * count)}" in line
        assert re.search(r"all arrays [\d.]+ (Ki|Mi)B; .*process [\d.]+ [MG]iB of the host", line)
        assert f"state {bytes_text(sum(held.values()))} (" in line
    # Shards share the array's memory.
    masters = jax.tree.leaves(engine.state.master)
    twice = [*masters, *(shard.data for leaf in masters for shard in leaf.addressable_shards)]
    assert _bytes_on(jax.devices()[0], twice) == held["master weights"]


def test_what_is_parked_counts_for_nothing() -> None:
    config = ds_config(stage=0, micro=4, optimizer="AdamW", memory_breakdown=True)
    engine = make_engine(config)
    device = jax.devices()[0]
    before = state_on(device, engine.state, engine.layout)
    assert before["optimizer moments"] == 2 * before["master weights"] > 0
    engine.offload_states(include=["optim_states"])
    after = state_on(device, engine.state, engine.layout)
    assert after["optimizer moments"] == 0
    assert after["master weights"] == before["master weights"]


def test_frozen_parameters_have_no_masters() -> None:
    config = ds_config(
        stage=0, micro=4, optimizer="AdamW", memory_breakdown=True, trainable=["blocks/.*"]
    )
    engine = make_engine(config)
    held = state_on(jax.devices()[0], engine.state, engine.layout)
    explained = explain_plan(engine._program, engine.plan)
    assert held["parameters"] == explained.role_bytes(Role.PARAM) > 0
    assert held["master weights"] == explained.role_bytes(Role.MASTER) > 0
    assert held["optimizer moments"] == 2 * held["master weights"]

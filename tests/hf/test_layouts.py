"""Folders read onto eight devices: what comes out, and which bytes are read for whom."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jspeed.core.tree import named_leaves
from jspeed.hf import Folder, Weights, load_parameter
from jspeed.hf.reading import parts_of
from tests.hf.test_round_trip import batch, engine_of

tiny = pytest.importorskip("tests.hf.tiny")

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.mark.parametrize("name", tiny.some_quick())
def test_zero_3_and_tensor_2(name, tmp_path):
    source, _ = tiny.saved(tmp_path / "theirs", name, seed=2)
    engine = engine_of(source, devices=8, mesh={"data": 4, "tensor": 2}, **ZERO3)
    one = engine_of(source)
    for path, values in engine.parameters().items():
        np.testing.assert_array_equal(values, one.parameters()[path], err_msg=path)
    losses = [float(each.train_batch(batch(name))["loss"]) for each in (engine, one)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    engine.save_hf_model(tmp_path / "ours")
    assert tiny.contents(tmp_path / "ours") == tiny.contents(source)
    ids = tiny.tokens()
    again = tiny.logits(tiny.read_back(tmp_path / "ours", name), ids)
    np.testing.assert_allclose(again, np.asarray(one.module(ids)), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"mesh": {"data": 2}, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
        {
            "mesh": {"data": 2},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        },
        {"mesh": {"pipe": 2, "data": 1}, "gradient_accumulation_steps": 2},
    ],
    ids=["zero 1 in bf16", "optimizer on the host", "pipeline"],
)
def test_other_layouts(config, tmp_path):
    source, _ = tiny.saved(tmp_path / "theirs", "qwen2", seed=4)
    engine = engine_of(source, devices=2, **config)
    one = engine_of(source).parameters()
    for path, values in engine.parameters().items():
        np.testing.assert_array_equal(values, one[path], err_msg=path)
    assert np.isfinite(float(engine.train_batch(batch("qwen2"))["loss"]))


@pytest.mark.parametrize("name", tiny.some_quick("gpt2", of=("gpt2", "llama", "bert")))
def test_devices_read_their_own_part(name, tmp_path):
    """Of what is split over all devices each byte is read once, of what is whole too, since all
    devices are given the same; so in all no more is read than the files hold."""
    source, _ = tiny.saved(tmp_path / "theirs", name)
    engine = engine_of(source, devices=8, train_batch_size=8, mesh={"data": 8}, **ZERO3)
    shapes = {path: leaf.shape for path, leaf in named_leaves(engine.state.master)}
    split = 0
    with Folder(source) as folder:
        weights = Weights(folder, model_family(name), shapes)
        for path, leaf in named_leaves(engine.state.master):
            before = folder.bytes_read
            like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            loaded = load_parameter(weights, path, like)
            np.testing.assert_array_equal(loaded, leaf)
            assert folder.bytes_read - before == leaf.nbytes, path
            for bounds, devices in parts_of(like).items():
                before = folder.bytes_read
                weights.read(
                    path, tuple(slice(*pair) for pair in bounds[weights.entry(path).stacked :])
                )
                layers = bounds[0][1] - bounds[0][0] if weights.entry(path).stacked else 1
                of_device = leaf.addressable_shards[0].data.nbytes // layers
                assert folder.bytes_read - before == of_device, path
                split += len(devices) == 1
    assert split > 50


def model_family(name: str) -> str:
    return {"gpt2_untied": "gpt2", "llama3": "llama"}.get(name, name)

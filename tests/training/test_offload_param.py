"""Training with the layers' parameters in host memory: equal to training without, resumed to the
last bit, and where the bytes are. What the devices fetch when is in tests/gpu_target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jspeed.config.remat import Checkpoint
from jspeed.core.errors import ConfigError, LayoutError
from jspeed.core.tree import named_leaves
from jspeed.engine.engine import Engine
from jspeed.models import ModelFactory
from jspeed.models.llama.config import LlamaConfig
from jspeed.offload import HostOptimizer
from tests.training.curves import TINY, VOCAB, batches
from tests.training.offloaded import CLOSE, STREAMED_LAYOUTS, check_same, make_engine, train

ON_HOST = {"device": "cpu"}


def streamed_engine(**more: Any) -> Engine:
    """Of the tiny GPT-2, with its layers' parameters in host memory."""
    zero = {"offload_param": ON_HOST, **more.pop("zero", {})}
    return make_engine(ON_HOST, zero=zero, **more)


def _plain_engine(**more: Any) -> Engine:
    return make_engine(None, **more)


_QUICK = (6,)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[] if n in _QUICK else pytest.mark.slow)
        for n, layout in enumerate(STREAMED_LAYOUTS)
    ],
    ids=str,
)
def test_curves_equal_those_without(layout):
    check_same(streamed_engine(**layout), _plain_engine(**layout))


def test_layers_are_in_host_memory_and_nothing_else():
    engine = streamed_engine(bf16={"enabled": True})
    kinds = {path: leaf.sharding.memory_kind for path, leaf in named_leaves(engine.state.master)}
    stacks = {path for path in kinds if path.startswith("blocks/")}
    assert engine.layout.params_on_host == stacks
    assert {path for path, kind in kinds.items() if kind == "pinned_host"} == stacks
    assert {path for path, kind in kinds.items() if kind == "device"} == set(kinds) - stacks
    train(engine, 1)
    left = engine.state.host_gradients
    assert set(left) == stacks
    assert {leaf.sharding.memory_kind for leaf in left.values()} == {"pinned_host"}
    assert {leaf.dtype.name for leaf in left.values()} == {"bfloat16"}
    assert all(np.any(np.asarray(leaf, np.float32)) for leaf in left.values())


def test_small_parameters_stay_on_the_devices():
    engine = streamed_engine(zero={"stage3_param_persistence_threshold": 1024})
    assert engine.layout.params_on_host == {
        f"blocks/{name}/kernel" for name in ("attn/proj", "attn/qkv", "mlp/fc", "mlp/proj")
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.slow
def test_half_precision_skips_and_clips_as_without(dtype):
    """Of fp16 the first steps overflow; that shows in the squares of what has left for the host."""
    precision: dict[str, Any] = {dtype: {"enabled": True}, "gradient_clipping": 0.1}
    if dtype == "fp16":
        precision[dtype]["initial_scale_power"] = 20
    plain, streamed = make_engine(ON_HOST, **precision), streamed_engine(**precision)
    np.testing.assert_allclose(train(streamed), train(plain), rtol=2e-3)
    assert streamed.skipped_steps == plain.skipped_steps
    assert (plain.skipped_steps > 0) == (dtype == "fp16")


def test_resumed_to_the_last_bit_and_without(tmp_path):
    """The checkpoint is any other run's: it goes on without anything in host memory as well."""
    first = streamed_engine()
    train(first, 3)
    first.save_checkpoint(tmp_path)
    first.wait_for_checkpoint()
    rest = train(first, 3, skip=3)
    second = streamed_engine()
    second.load_checkpoint(tmp_path)
    assert train(second, 3, skip=3) == rest
    plain = make_engine(None, devices=4, stage=1)
    plain.load_checkpoint(tmp_path)
    np.testing.assert_allclose(train(plain, 3, skip=3), rest, rtol=1e-5)


@pytest.mark.slow
def test_loaded_from_a_run_without(tmp_path):
    first = make_engine(None, devices=4, stage=1)
    train(first, 3)
    first.save_checkpoint(tmp_path)
    first.wait_for_checkpoint()
    second = streamed_engine()
    second.load_checkpoint(tmp_path)
    np.testing.assert_allclose(train(second, 3, skip=3), train(first, 3, skip=3), rtol=1e-5)


@pytest.mark.slow
def test_what_the_host_writes_is_what_devices_fetch(monkeypatch):
    """Without its update in place the layers stay as they were, and the others do not."""
    engine = streamed_engine()
    before = {path: np.array(leaf) for path, leaf in named_leaves(engine.state.master)}
    monkeypatch.setattr(HostOptimizer, "_update_resident", _read_only)
    train(engine, 6)
    for path, leaf in named_leaves(engine.state.master):
        stayed = np.array_equal(before[path], np.array(leaf))
        assert stayed == path.startswith("blocks/"), path


def _read_only(self: Any, resident: Any, piece: Any, gradients: Any, states: Any, step: Any):
    del self, resident, piece, step
    for _ in gradients:
        next(states)


@pytest.mark.slow
def test_evaluation_and_parking():
    """Layers are not moved by `offload_states`; nor do they come to the devices by the reverse."""
    plain, engine = make_engine(None), streamed_engine()
    (batch,) = batches(1)
    np.testing.assert_allclose(
        float(engine.eval_batch(batch)["loss"]), float(plain.eval_batch(batch)["loss"]), rtol=CLOSE
    )
    engine.offload_states()
    engine.reload_states()
    kinds = {path: leaf.sharding.memory_kind for path, leaf in named_leaves(engine.state.master)}
    assert {
        path for path, kind in kinds.items() if kind != "device"
    } == engine.layout.params_on_host
    np.testing.assert_allclose(train(engine, 3), train(plain, 3), rtol=CLOSE)


def test_the_model_can_be_called():
    """With all its parameters on the device."""
    layout: dict[str, Any] = {"devices": 1, "stage": 0}
    ids = batches(1)[0]["input_ids"]
    found, expected = (make(**layout).module(ids) for make in (streamed_engine, _plain_engine))
    np.testing.assert_allclose(found, expected, rtol=CLOSE)


@pytest.mark.slow
def test_microbatches_add_up_in_their_own_dtype_after_a_new_batch_size():
    """What one microbatch leaves is as it was reduced."""
    engine = streamed_engine(bf16={"enabled": True})
    kept = {str(leaf.dtype) for leaf in engine.state.host_gradients.values()}
    assert (engine.gradient_accumulation_steps(), kept) == (1, {"bfloat16"})
    engine.set_train_batch_size(2 * engine.train_batch_size())
    assert {str(leaf.dtype) for leaf in engine.state.host_gradients.values()} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "remat", ["full", "dots", "attention", Checkpoint(offload=("layer_in",))], ids=str
)
def test_curves_are_equal_under_rematerialisation(remat):
    model = ModelFactory("gpt2", replace(TINY, remat=remat))
    plain, streamed = make_engine(None, model=model), streamed_engine(model=model)
    np.testing.assert_allclose(train(streamed, 5), train(plain, 5), rtol=CLOSE)


@pytest.mark.slow
def test_curves_of_a_llama_are_equal():
    config = LlamaConfig(
        vocab_size=VOCAB,
        layers=3,
        hidden_size=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        attention="cpu",
    )
    model = ModelFactory("llama", config)
    plain, streamed = make_engine(None, model=model), streamed_engine(model=model)
    np.testing.assert_allclose(train(streamed, 5), train(plain, 5), rtol=CLOSE)


@pytest.mark.slow
def test_groups_of_layers_are_refused():
    model = ModelFactory("gpt2", replace(TINY, layers=4, remat=Checkpoint(layers=2)))
    with pytest.raises(LayoutError, match=r"parameter blocks/.* stays in host memory"):
        train(streamed_engine(model=model), 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"offload": None}, r'and it is "none". Set "zero_optimization.offload_optimizer"'),
        ({"offload": {"device": "cpu", "ratio": 0.5}}, r'with "ratio": 0.5. Set'),
        ({"mesh": {"pipe": 2}}, r'"cpu" does not go with "mesh.pipe": 2: stages'),
        (
            {"zero": {"stage3_param_persistence_threshold": 10**6}},
            "no parameter of this model stacks layers that are large enough",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(more, message):
    more = dict(more)
    offload = more.pop("offload", ON_HOST)
    zero = {"offload_param": more.pop("param", ON_HOST), **more.pop("zero", {})}
    with pytest.raises(ConfigError) as error:
        make_engine(offload, zero=zero, **more)
    assert message in str(error.value)
    assert str(error.value).startswith('"zero_optimization.offload_param.device": "')

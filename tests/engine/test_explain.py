from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.config import Config, load_config
from jspeed.core.errors import ConfigError, LayoutError
from jspeed.core.tree import named_leaves
from jspeed.engine.build import plan_devices, plan_run
from jspeed.engine.engine import initialize
from jspeed.engine.explain import explain_run
from jspeed.engine.state_explanation import gather_notes
from jspeed.layout.mesh import MeshShape, make_abstract_mesh
from jspeed.layout.placing import ZeroSettings, place
from jspeed.models import ModelFactory, build_model
from jspeed.nn import language_model_loss
from jspeed.training.program import make_program
from jspeed.training.state import TrainState, abstract_parameters, abstract_state

MODEL = {"family": "gpt2", "layers": 2, "hidden_size": 32, "heads": 2, "sequence_length": 16}


def run_file(**changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "model": {**MODEL, "vocab_size": 64},
        **changes,
    }


def zero(stage: int, threshold: int = 0, **rest: Any) -> dict[str, Any]:
    return {"stage": stage, "stage3_param_persistence_threshold": threshold, **rest}


def model_of(config: Config) -> ModelFactory:
    assert config.model is not None
    return build_model(config.model, vocab_size=1, platform="cpu")


def zeros_in_place(config: Config) -> TrainState:
    """A state on 8 devices as a run would place it, without the time that compiling takes."""
    config = config.resolve_auto()
    program = make_program(model_of(config))
    plan = plan_run(config, program, plan_devices(config))

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = jax.random.split(jax.random.key(0), leaf.shape)
        else:
            value = np.zeros(leaf.shape, leaf.dtype)
        return jax.device_put(value, leaf.sharding)

    shapes = abstract_state(program, plan.optimizer, plan.layout, plan.loss_scale)
    return jax.tree.map(zeros, shapes)


def bytes_on_first_device(tree: Any) -> int:
    def data(leaf: Any) -> Any:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in data(leaf).addressable_shards
        if shard.device == first
    )


CASES = {
    "stage 1": run_file(bf16={"enabled": True}, zero_optimization=zero(1)),
    "stage 3": run_file(bf16={"enabled": True}, zero_optimization=zero(3)),
    "stage 3, small ones whole": run_file(bf16={"enabled": True}, zero_optimization=zero(3, 500)),
    "stage 3 in fp32, small ones whole": run_file(zero_optimization=zero(3, 500)),
    "stage 2 in fp16 with groups, dropout and Muon": run_file(
        fp16={"enabled": True},
        zero_optimization=zero(2, mics_shard_size=2),
        optimizer={"type": "Muon", "params": {"lr": 1e-3}},
        model={**MODEL, "vocab_size": 64, "dropout": 0.1},
    ),
    "stage 3 with tensor, little dividing": run_file(
        bf16={"enabled": True},
        zero_optimization=zero(3),
        mesh={"tensor": 2, "rules": [["blocks/mlp/fc/kernel", [None, None, "tensor"]]]},
        model={**MODEL, "vocab_size": 61, "hidden_size": 30},
    ),
}


def check_bytes(found: dict[str, Any], state: TrainState) -> None:
    moments = [leaf for _, leaf in named_leaves(state.opt_state) if leaf.ndim]
    counters = [leaf for _, leaf in named_leaves(state.opt_state) if not leaf.ndim]
    by_role = {
        "param": bytes_on_first_device(state.copies),
        "master": bytes_on_first_device(state.master),
        "moments": bytes_on_first_device(moments),
    }
    assert found["state_bytes_per_device"] == {**by_role, "total": sum(by_role.values())}
    rest = (state.step, state.updates, state.rng, state.mutable, state.loss_scale, counters)
    assert found["other_bytes_per_device"] == bytes_on_first_device(rest)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.master))
    for leaf, (path, array) in zip(found["leaves"], named_leaves(state.master), strict=True):
        assert (leaf["path"], leaf["dtype"]) == (path, "float32")
        assert leaf["roles"]["master"]["bytes_per_device"] == bytes_on_first_device(array)


@pytest.mark.parametrize("source", CASES.values(), ids=CASES.keys())
def test_bytes_are_those_of_the_arrays(source: dict[str, Any]) -> None:
    config = load_config(source)
    check_bytes(explain_run(config, devices=8).to_json(), zeros_in_place(config))


def test_bytes_are_those_of_an_engine() -> None:
    config = load_config(CASES["stage 3, small ones whole"])
    engine = initialize(model=model_of(config), loss_fn=language_model_loss, config=config)
    check_bytes(explain_run(config, devices=8).to_json(), engine.state)


def test_any_number_of_devices_without_devices() -> None:
    source = run_file(bf16={"enabled": True}, zero_optimization=zero(3), mesh={"data": 8})
    explanation = explain_run(load_config(source), devices=32)
    found = explanation.to_json()
    assert found["devices"] == 32
    assert found["mesh"]["data"] == 32
    assert found["state_bytes_per_device"]["total"] == 12 * found["parameters"] // 32
    assert found["remarks"] == [
        '"mesh.data": 8 gives way to 32 devices; to train on them, leave it out.'
    ]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"mesh": {"data": 4, "tensor": 2}}, 8),
        ({"mesh": {"tensor": 2}}, 2),
        ({"zero_optimization": zero(1, mics_shard_size=4)}, 4),
        ({}, 1),
    ],
)
def test_the_mesh_says_how_many_devices(changes: dict[str, Any], devices: int) -> None:
    explanation = explain_run(load_config(run_file(**changes)))
    assert explanation.state.devices == devices
    said = [text for text in explanation.remarks if f"laid out for {devices}." in text]
    assert len(said) == (changes.get("mesh", {}).get("data") is None)


def test_batch_sizes_that_do_not_hold_are_a_remark() -> None:
    source = run_file(train_batch_size=8, zero_optimization=zero(1))
    explanation = explain_run(load_config(source), devices=16)
    assert explanation.remarks == (
        'training would refuse these batch sizes: "train_batch_size": 8 is not divisible by micro '
        "batch 1 x 16 data-parallel devices = 16 (remainder 8). The nearest that hold: "
        '"train_batch_size" 16.',
    )


def test_the_batch_that_elasticity_chose_is_a_remark() -> None:
    section = {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1, 2]}
    source = run_file(elasticity=section, zero_optimization=zero(1))
    source.pop("train_micro_batch_size_per_gpu")
    explanation = explain_run(load_config(source), devices=2)
    assert explanation.remarks == (
        '"elasticity" chose a batch of 8 rows, here 2 per device x 2 microbatch(es) x 2 shard(s); '
        "it holds on 1, 2, 4, 8 devices",
    )
    explanation = explain_run(load_config(source), devices=3)
    assert [text[:42] for text in explanation.remarks] == [
        'training would refuse these batch sizes: "',
    ]


def test_an_axis_that_splits_nothing_is_a_remark() -> None:
    rules = [
        ["blocks/attn/qkv/kernel", [None] * 4],
        ["blocks/attn/qkv/bias", [None] * 3],
        [".*/kernel", [None] * 3],
        ["blocks/mlp/fc/bias", [None] * 2],
        ["wte", [None] * 2],
    ]
    idle = explain_run(load_config(run_file(mesh={"tensor": 2, "rules": rules})), devices=4)
    used = explain_run(load_config(run_file(mesh={"tensor": 2})), devices=4)
    assert idle.remarks == (
        '"mesh.tensor": 2, but no parameter is split over it: each is held 2 times. See '
        '"mesh.rules".',
    )
    assert used.remarks == ()


def test_keys_that_are_not_built_yet_are_listed() -> None:
    source = run_file(zero_optimization=zero(3, zero_quantized_weights=True))
    (said,) = explain_run(load_config(source), devices=4).not_built
    assert said.startswith('"zero_optimization.zero_quantized_weights": true: ')


def test_what_only_a_run_resolves_is_left_open() -> None:
    source = run_file(
        train_batch_size="auto",
        train_micro_batch_size_per_gpu="auto",
        optimizer={"type": "AdamW", "params": {"lr": "auto"}},
        zero_optimization=zero(3, stage3_prefetch_bucket_size="auto")
        | {"stage3_param_persistence_threshold": "auto"},
    )
    explanation = explain_run(load_config(source), devices=4)
    assert explanation.remarks == (
        '"auto" is left open here, and to be set for training: optimizer.params.lr, '
        "train_batch_size, train_micro_batch_size_per_gpu.",
    )
    # 10 x hidden_size, as in Hugging Face's integration.
    assert "fewer than 320 elements a layer" in explanation.state.stayed_whole[0].whole_because


@pytest.mark.parametrize(
    ("data", "vocabulary", "remark"),
    [
        (
            {"tokenizer": {"kind": "byte"}},
            257,
            'vocabulary 257, from "data.tokenizer.vocab_size".',
        ),
        (
            {"tokenizer": {"kind": "bpe", "vocab_size": 1000}},
            1000,
            'vocabulary 1,000, from "data.tokenizer.vocab_size"; a tokenizer trained on little '
            "text has fewer.",
        ),
    ],
)
def test_the_vocabulary_is_known_without_data(
    data: dict[str, Any], vocabulary: int, remark: str
) -> None:
    explanation = explain_run(load_config(run_file(model=MODEL, data=data)), devices=2)
    shapes = {leaf.path: leaf.shape for leaf in explanation.state.leaves}
    assert shapes["wte"] == (vocabulary, 32)
    assert explanation.remarks == (remark,)


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ({"train_batch_size": 8}, ConfigError, '"model": missing.'),
        (run_file(model=MODEL), ConfigError, '"model.vocab_size": missing, and there is no "data"'),
        (
            run_file(mesh={"tensor": 3}),
            LayoutError,
            '"mesh": 4 devices cannot be divided by the other axes (tensor 3 = 3).',
        ),
        (
            run_file(mesh={"rules": [["blocks/mlp/kernel", [None]]]}),
            LayoutError,
            '"mesh.rules": blocks/mlp/kernel -> [-] matches no parameter.',
        ),
    ],
)
def test_what_cannot_be_laid_out(source: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error) as caught:
        explain_run(load_config(source), devices=4)
    assert str(caught.value).startswith(text)


def notes(stage: int, weights: dict[str, tuple[int, ...]], loss: Any) -> Any:
    """What is noted for a function of plain arrays on 4 devices."""
    params = {name: jnp.zeros(shape) for name, shape in weights.items()}
    program = make_program((lambda key: params, lambda params, x: loss(params, x)))
    layout = place(
        abstract_parameters(program)[0],
        mesh=make_abstract_mesh(MeshShape(data=4)),
        zero=ZeroSettings(stage, 0),
    )
    batch = {"x": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    return gather_notes(program, lambda model, batch, rng: model(batch["x"]), layout, batch)


def scanned(params: Any, x: jax.Array) -> jax.Array:
    x = x[:, : params["w"].shape[-1]]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0].mean()


def test_what_a_model_does_not_let_gather_layer_by_layer() -> None:
    # The only dimension that divides by 4 is the one that stacks the layers.
    because = "sharded along the axis its layers are stacked on"
    assert notes(3, {"w": (16, 6, 6)}, scanned) == (("w", because),)
    assert notes(2, {"w": (16, 6, 6)}, scanned) == ()
    assert notes(3, {"w": (5, 8, 8)}, scanned) == ()


def test_the_engine_explains_a_model_of_ones_own() -> None:
    params = {"w": jnp.zeros((16, 6, 6)), "v": jnp.zeros((8,))}

    def engine(stage: int) -> Any:
        return initialize(
            model=(lambda key: params, lambda params, x: scanned(params, x) + params["v"].sum()),
            loss_fn=lambda model, batch, rng: model(batch["x"]),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 3,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "zero_optimization": zero(stage),
            },
            devices=jax.devices()[:4],
        )

    batch = {"x": np.zeros((24, 8), np.float32)}
    found = engine(3).explain(batch)
    assert found.notes == (("w", "sharded along the axis its layers are stacked on"),)
    assert (found.devices, found.stage, found.parameters) == (4, 3, 16 * 36 + 8)
    # fp32 master and two moments, of which each device has a quarter.
    assert found.total_bytes == 3 * (16 * 36 + 8)
    without = engine(3).explain()
    assert (without.notes, without.total_bytes) == ((), found.total_bytes)
    assert engine(2).explain(batch).notes == ()


def test_our_own_models_gather_layer_by_layer() -> None:
    for family, remat in (("gpt2", "none"), ("llama", "full")):
        source = run_file(
            zero_optimization=zero(3),
            model={**MODEL, "family": family, "vocab_size": 64, "remat": remat},
            data={"document_mask": True, "tokenizer": {"kind": "bpe", "vocab_size": 64}},
        )
        assert explain_run(load_config(source), devices=4).state.notes == ()


def test_every_parameter_of_the_families_names_its_dimensions() -> None:
    llama = {**MODEL, "family": "llama", "vocab_size": 64, "kv_heads": 1}
    for model in ({**MODEL, "vocab_size": 64}, llama):
        found = explain_run(load_config(run_file(model=model)), devices=2).to_json()
        names = {leaf["path"]: leaf["logical_axes"] for leaf in found["leaves"]}
        assert all(len(names[leaf["path"]]) == len(leaf["shape"]) for leaf in found["leaves"])
    assert names["blocks/attn/k/kernel"] == ["layers", "embed", "kv_heads"]

"""jspeed/config/rules.py: what must hold between keys."""

import re

import pytest

from jspeed.config import LayerSpec, load_config
from jspeed.core.errors import ConfigError

BATCH = {"train_batch_size": 8}
MODEL = {"family": "gpt2", "layers": 2, "hidden_size": 64, "heads": 4, "sequence_length": 32}
LLAMA = {**MODEL, "family": "llama"}
SCALING = {"factor": 8, "original_max_position_embeddings": 16}


def zero(**keys):
    return {"zero_optimization": keys}


BROKEN = [
    (
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        '"fp16.enabled": true while "bf16.enabled" is true; only one can be. Set one of them to '
        "false.",
    ),
    (
        {"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}},
        '"data_types.param_dtype": "fp16" does not agree with the compute dtype bf16 that '
        "fp16/bf16 set; expected bf16, or leave it out.",
    ),
    (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "float16"}},
        '"data_types.grad_accum_dtype": "fp16" does not agree with the compute dtype bf16 that '
        "fp16/bf16 set; expected bf16 or fp32, or leave it out.",
    ),
    (
        {"fp16": {"enabled": True, "loss_scale_window": 0}},
        '"fp16.loss_scale_window": 0 must be above 0 with dynamic loss scaling '
        '("fp16.loss_scale": 0).',
    ),
    (
        {"fp16": {"enabled": True, "min_loss_scale": -1}},
        '"fp16.min_loss_scale": -1.0 must be above 0 with dynamic loss scaling '
        '("fp16.loss_scale": 0).',
    ),
    (
        {"fp16": {"loss_scale": -1}},
        '"fp16.loss_scale": -1 is not a number of at least 0.',
    ),
    (
        {"fp16": {"loss_scale": True}},
        '"fp16.loss_scale": true is not a number of at least 0. A boolean is not a number.',
    ),
    (
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        '"fp16.fp16_master_weights_and_grads": true needs "zero_optimization.stage" 1, 2 or 3.',
    ),
    (
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}, **zero(stage=1)},
        '"bf16.bf16_optimizer_states": true needs "bf16.bf16_master_weights_and_grads": true.',
    ),
    (
        {"gradient_allreduce_op": "SUM", **zero(stage=3)},
        '"gradient_allreduce_op": "sum" does not go with "zero_optimization.stage": 3; use "mean".',
    ),
    (
        {"gradient_allreduce_op": "sum", "compile": {"deepcompile": True}},
        '"gradient_allreduce_op": "sum" does not go with "compile.deepcompile": true; use "mean".',
    ),
    (
        {"gradient_allreduce_op": "sum", **zero(stage=1, zenflow={})},
        '"gradient_allreduce_op": "sum" does not go with "zero_optimization.zenflow"; use "mean".',
    ),
    (
        zero(stage=3, offload_optimizer={"device": "nvme"}),
        '"zero_optimization.offload_optimizer.nvme_path": missing; '
        '"zero_optimization.offload_optimizer.device": "nvme" needs a folder on the disk.',
    ),
    (
        zero(offload_optimizer={"device": "nvme", "nvme_path": "/x", "buffer_count": 2}),
        '"zero_optimization.offload_optimizer.buffer_count": 2; expected at least 3: one in use, '
        "one being read, one being written.",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
        '"optimizer.params.adam_w_mode": false contradicts "type": "AdamW"; for L2 regularisation '
        'write "type": "Adam".',
    ),
    (
        {"optimizer": {"type": "sgd", "params": {"nesterov": True}}},
        '"optimizer.params.nesterov": true needs a momentum above 0 and no dampening.',
    ),
    (
        {"mesh": {"data": 0}},
        '"mesh.data": 0 is not a number of devices; expected at least 1, or -1 for all that '
        "remain.",
    ),
    ({"mesh": {"replica": -1}}, '"mesh.replica": -1 is not an integer of at least 1.'),
    (
        zero(stage=3, mics_shard_size=0),
        '"zero_optimization.mics_shard_size": 0 is not a number of devices; -1 is off.',
    ),
    (
        {"mesh": {"data": 8}, **zero(stage=3, mics_shard_size=3)},
        '"zero_optimization.mics_shard_size": 3 does not divide "mesh.data": 8 (remainder 2) into '
        "groups that each hold one set of shards.",
    ),
    (
        {"model": {**MODEL, "heads": 5}},
        '"model.hidden_size": 64 is not divisible by "model.heads" 5 (remainder 4).',
    ),
    (
        {"model": {**LLAMA, "kv_heads": 3}},
        '"model.kv_heads": 3 does not divide "model.heads" 4; every key/value head serves the same '
        "number of query heads.",
    ),
    (
        {"model": {**MODEL, "kv_heads": 2}},
        '"model.kv_heads": 2 differs from heads 4, but gpt2 has no grouped-query attention; use '
        '"family": "llama".',
    ),
    (
        {"model": {**MODEL, "rope_theta": 5e5}},
        '"model.rope_theta": gpt2 has learned positions; remove it, or use "family": "llama".',
    ),
    (
        {"model": {**MODEL, "rope_scaling": SCALING}},
        '"model.rope_scaling": gpt2 has learned positions; remove it, or use "family": "llama".',
    ),
    (
        {"model": {**LLAMA, "rope_scaling": {**SCALING, "low_freq_factor": 4}}},
        '"model.rope_scaling.low_freq_factor": 4 must be below high_freq_factor 4.',
    ),
    (
        {"model": {**LLAMA, "dropout": 0.1}},
        '"model.dropout": 0.1 is given, but llama has no dropout; set it to 0.',
    ),
    (
        {"model": MODEL, "data": {"sequence_length": 64}},
        '"data.sequence_length": 64 is longer than "model.sequence_length" 32.',
    ),
    (
        {"data": {"source": "golden"}},
        '"data.sequence_length": missing; set it, or "model.sequence_length".',
    ),
    (
        {"model": MODEL, "data": {"tokenizer": {"kind": "file"}}},
        '"data.tokenizer.path": missing; "kind": "file" needs a tokenizer.json.',
    ),
    (
        {"model": MODEL, "data": {"tokenizer": {"path": "t.json"}}},
        '"data.tokenizer.path": "t.json" is given, but "data.tokenizer.kind" is "bpe"; set it to '
        '"file".',
    ),
    (
        {"model": MODEL, "data": {"tokenizer": {"kind": "byte", "vocab_size": 300}}},
        '"data.tokenizer.vocab_size": 300 given, but bytes have 257 ids; remove it.',
    ),
    (
        {"model": MODEL, "data": {"tokenizer": {"kind": "file", "path": "t", "vocab_size": 9}}},
        '"data.tokenizer.vocab_size": 9 given, but the file says how many ids there are; remove '
        "it.",
    ),
    (
        {"model": {**MODEL, "vocab_size": 1000}, "data": {"tokenizer": {"vocab_size": 1001}}},
        '"model.vocab_size": 1000 is smaller than the tokenizer\'s 1001 ids '
        '("data.tokenizer.vocab_size"); leave it out to use the tokenizer\'s size.',
    ),
]


@pytest.mark.parametrize(("tree", "message"), BROKEN)
def test_broken_rules(tree, message):
    with pytest.raises(ConfigError) as error:
        load_config({**BATCH, **tree})
    assert str(error.value) == message


@pytest.mark.parametrize(
    "tree",
    [
        {"fp16": {"enabled": True, "loss_scale": 128, "loss_scale_window": 0, "min_loss_scale": 0}},
        {"fp16": {"loss_scale_window": -5, "min_loss_scale": 0}},
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}, **zero(stage=1)},
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True,
                  "bf16_optimizer_states": True}, **zero(stage=2)},
        {"gradient_allreduce_op": "sum", **zero(stage=2)},
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        {"optimizer": {"type": "SGD", "params": {"nesterov": True, "momentum": 0.9}}},
        {"mesh": {"data": 8}, **zero(stage=3, mics_shard_size=4)},
        {"model": LLAMA, "data": {"tokenizer": {"kind": "byte", "vocab_size": 257}}},
        {"model": {**LLAMA, "rope_theta": 5e5, "rope_scaling": SCALING, "kv_heads": 2}},
        {"data_types": {"grad_accum_dtype": "float32", "param_dtype": "fp32"}},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "torch.bfloat16"}},
    ],
)  # fmt: skip
def test_what_holds_is_accepted(tree):
    assert load_config({**BATCH, **tree}).batch.train_batch_size == 8


@pytest.mark.parametrize(
    ("tree", "path", "alternative"),
    [
        ({"amp": {"enabled": True, "opt_level": "O2"}}, "amp.enabled", "use bf16 or fp16"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "use bf16"),
        ({"nebula": {"enabled": True}}, "nebula.enabled", "asynchronous already"),
        ({"sparse_gradients": True}, "sparse_gradients", "set it to false"),
        (zero(legacy_stage1=True), "zero_optimization.legacy_stage1", "remove the key"),
        ({"checkpoint": {"use_node_local_storage": True}}, "checkpoint.use_node_local_storage",
         "one folder that every process must see"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation",
         "engine.train_step"),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad",
         "remove it"),
    ],
)  # fmt: skip
def test_refused_features_give_the_alternative(tree, path, alternative):
    with pytest.raises(ConfigError) as error:
        load_config({**BATCH, **tree})
    message = str(error.value)
    assert message.startswith(f'"{path}": ')
    assert " is refused: " in message
    assert alternative in message


def test_refused_keys_that_are_off_may_stand():
    """And the same keys may not once they are on."""
    off = {
        **BATCH,
        "amp": {"enabled": False, "opt_level": "O1"},
        "nebula": {"enabled": False, "persistent_time_interval": 5},
        "sparse_gradients": False,
        "zero_optimization": {"legacy_stage1": False},
    }
    load_config(off).require_trainable()
    for path, on in (
        ("amp.enabled", {"amp": {"enabled": True, "opt_level": "O1"}}),
        ("nebula.enabled", {"nebula": {"enabled": True, "persistent_time_interval": 5}}),
        ("sparse_gradients", {"sparse_gradients": True}),
        ("zero_optimization.legacy_stage1", {"zero_optimization": {"legacy_stage1": True}}),
    ):
        with pytest.raises(ConfigError, match=re.escape(f'"{path}"')):
            load_config(off | on)


@pytest.mark.parametrize(
    ("length", "seq", "message"),
    [
        (100, 8, '"data.sequence_length": 100 is not divisible by "mesh.seq" 8 (remainder 4). Use '
                 '96 or 104 tokens, or "mesh.seq": 5.'),
        (3, 4, '"data.sequence_length": 3 is not divisible by "mesh.seq" 4 (remainder 3). Use 4 '
               'tokens, or "mesh.seq": 3.'),
    ],
)  # fmt: skip
def test_a_split_sequence_has_equal_parts(length, seq, message):
    tree = {
        "train_batch_size": 8,
        "mesh": {"seq": seq},
        "model": {"family": "gpt2", "layers": 1, "hidden_size": 8, "heads": 2,
                  "sequence_length": length},
        "data": {"source": "golden"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        load_config(tree)
    assert message in str(error.value)


def test_the_ring_is_refused_in_a_pipeline():
    tree = {
        "train_batch_size": 8,
        "mesh": {"pipe": 2, "seq": 2},
        "model": {**MODEL, "attention": {"sequence_parallel": "ring"}},
    }
    with pytest.raises(ConfigError) as error:
        load_config(tree)
    assert str(error.value) == (
        '"model.attention.sequence_parallel": "ring" does not go with "mesh.pipe" 2: its permutes '
        'would stand in branches that stages take differently. Use "ulysses" or "allgather".'
    )


def test_sizes_of_tensor_parallelism_are_one():
    base = {"train_batch_size": 8}
    asked = load_config({**base, "tensor_parallel": {"autotp_size": 4}})
    assert asked.mesh.tensor == 4
    assert asked.tensor_parallel.asked
    tp = load_config({**base, "tensor_parallel": {"tp": {"tp_size": 2}}, "mesh": {"tensor": 2}})
    assert tp.mesh.tensor == 2
    assert not load_config({**base, "tensor_parallel": {"autotp_size": 1}}).tensor_parallel.asked
    with pytest.raises(ConfigError) as error:
        load_config({**base, "tensor_parallel": {"autotp_size": 4}, "mesh": {"tensor": 2}})
    assert str(error.value) == (
        '"tensor_parallel.autotp_size": 4 contradicts "mesh.tensor": 2. They set the same thing; '
        "keep the second."
    )


def test_layer_specs_are_read_and_their_patterns_checked():
    def config(*specs):
        partition = {"layer_specs": list(specs), "use_default_specs": False}
        section = {"autotp_size": 2, "partition_config": partition}
        return load_config({"train_batch_size": 8, "tensor_parallel": section}).tensor_parallel

    found = config(
        {"patterns": [".*o_proj", ".*down"], "partition_type": "row"},
        {"patterns": ".*qkv", "shape": [3, -1], "partition_dim": 0, "model_types": "bloom"},
    )
    assert found.layer_specs == (
        LayerSpec((".*o_proj", ".*down"), "row"),
        LayerSpec((".*qkv",), "column", ("bloom",), fused=True),
    )
    assert not found.use_default_specs
    with pytest.raises(ConfigError, match=r'layer_specs\[0\].patterns": "\(" is no regular expr'):
        config({"patterns": "("})

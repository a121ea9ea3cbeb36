"""`model.remat` and DeepSpeed's `activation_checkpointing`: what they mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from jspeed.config import Budget, Checkpoint, LayerRange, load_config
from jspeed.config.remat import TENSORS
from jspeed.core.errors import ConfigError

MODEL = {"family": "gpt2", "layers": 4, "hidden_size": 32, "heads": 2, "sequence_length": 16}


def run_file(remat: Any = None, *, model: dict[str, Any] | None = None, **more: Any) -> dict:
    asked = {} if remat is None else {"remat": remat}
    return {"train_batch_size": 8, "model": {**MODEL, **asked, **(model or {})}, **more}


def checkpointing(**keys: Any) -> dict[str, Any]:
    return {"activation_checkpointing": keys}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (None, "none"),
        ("FULL", "full"),
        ("dots", "dots"),
        ("attention", "attention"),
        ({"save": ["mlp_in", "mlp_in"]}, Checkpoint(save=("mlp_in",))),
        (
            {"offload": ["layer_in"], "save": ["attention_out"]},
            Checkpoint(save=("attention_out",), offload=("layer_in",)),
        ),
        ({"layers_per_checkpoint": 2}, Checkpoint(layers=2)),
        (
            [{"layers": [0, 1], "policy": "full"}, {"layers": [3, 3], "policy": {"save": []}}],
            (LayerRange(0, 1, "full"), LayerRange(3, 3, Checkpoint())),
        ),
        ({"budget_bytes": 10**9}, Budget(10**9)),
        ({"budget": "auto"}, Budget()),
    ],
)
def test_what_a_policy_means(written, meant):
    config = load_config(run_file(written))
    assert config.model is not None
    assert config.model.remat == meant
    assert load_config(config.to_dict()).model == config.model


@pytest.mark.parametrize(
    ("keys", "remat", "meant"),
    [
        ({"cpu_checkpointing": True}, None, Checkpoint(offload=("layer_in",))),
        ({"number_checkpoints": 2}, "full", Checkpoint(layers=2)),
        ({"number_checkpoints": 4}, None, Checkpoint()),
        (
            {"number_checkpoints": 1, "cpu_checkpointing": True},
            None,
            Checkpoint(offload=("layer_in",), layers=4),
        ),
        ({"partition_activations": True}, "dots", "dots"),
        ({"contiguous_memory_optimization": True}, None, "none"),
    ],
)
def test_deepspeeds_keys_become_a_policy(keys, remat, meant):
    config = load_config(run_file(remat, **checkpointing(**keys)))
    config.require_trainable()
    assert config.model is not None
    assert config.model.remat == meant
    assert load_config(config.to_dict()).model == config.model


EXPECTED = (
    'expected one of "none", "full", "dots", "attention", an object such as '
    '{"save": ["attention_out"], "offload": ["layer_in"]}, or a list of '
    '{"layers": [first, last], "policy": ...}.'
)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            run_file("some"),
            f'"model.remat": "some" is not {EXPECTED.removeprefix("expected ")}',
        ),
        (
            run_file({"save": ["attention_outs"]}),
            '"model.remat": {"save": ["attention_outs"]}: no model tags a tensor "attention_outs". '
            f'Did you mean "attention_out"? There are {", ".join(TENSORS)}; {EXPECTED}',
        ),
        (
            run_file({"keep": ["mlp_in"]}),
            f'"model.remat": {{"keep": ["mlp_in"]}}: the key "keep" is no part of a policy; '
            f"{EXPECTED}",
        ),
        (
            run_file({"budget": "auto", "save": ["mlp_in"]}),
            '"model.remat": {"budget": "auto", "save": ["mlp_in"]}: a budget is '
            '{"budget_bytes": n}, of at least 1 byte, or {"budget": "auto"}, alone; ' + EXPECTED,
        ),
        (
            run_file([{"layers": [2], "policy": "full"}]),
            '"model.remat": [{"layers": [2], "policy": "full"}]: layers [2] are not two numbers, '
            f"of the first layer (from 0) and the last; {EXPECTED}",
        ),
        (
            run_file([{"layers": [2, 4], "policy": "full"}]),
            '"model.remat": layers [2, 4]: the last of 4 layers is 3.',
        ),
        (
            run_file([
                {"layers": [0, 2], "policy": "full"}, {"layers": [2, 3], "policy": "dots"},
            ]),
            '"model.remat": layers [2, 3] do not come after those before them; ranges ascend.',
        ),
        (
            run_file({"save": ["mlp_in"], "offload": ["mlp_in"]}),
            '"model.remat": mlp_in is to be saved and offloaded; name it once.',
        ),
        (
            run_file({"layers_per_checkpoint": 3}),
            '"model.remat": layers_per_checkpoint 3 does not divide 4 layers (remainder 1).',
        ),
        (
            run_file({"layers_per_checkpoint": 2, "offload": ["layer_in", "mlp_in"]}),
            '"model.remat": offload mlp_in is not for checkpoints of several layers: XLA does not '
            "compile arrays in host memory that a loop inside a loop reads. There only layer_in "
            "can be offloaded; save the others.",
        ),
        (
            run_file({"offload": ["layer_in"]}, mesh={"pipe": 2}),
            '"model.remat": offloaded tensors are not for pipelines ("mesh.pipe" 2): a stage runs '
            "one loop over its layers and keeps microbatches in buffers on the device. Use a word "
            'or {"save": [...]}.',
        ),
        (
            run_file([{"layers": [0, 1], "policy": "full"}], mesh={"pipe": 2}),
            '"model.remat": layer ranges are not for pipelines ("mesh.pipe" 2): a stage runs one '
            "loop over its layers and keeps microbatches in buffers on the device. Use a word or "
            '{"save": [...]}.',
        ),
        (
            run_file(**checkpointing(number_checkpoints=3)),
            '"activation_checkpointing.number_checkpoints": 3 checkpoints do not divide '
            '"model.layers" 4 into equal groups.',
        ),
        (
            run_file("dots", **checkpointing(cpu_checkpointing=True)),
            '"activation_checkpointing.cpu_checkpointing": true contradicts "model.remat": "dots". '
            'Say all of it there, as {"offload": ["layer_in"], "layers_per_checkpoint": 1}, or '
            "leave that key out.",
        ),
        (
            run_file(
                model={"sequence_sharding": False}, **checkpointing(partition_activations=True)
            ),
            '"activation_checkpointing.partition_activations": true contradicts '
            '"model.sequence_sharding": false, which is what splits kept activations over '
            "mesh.tensor. Set it to true.",
        ),
        (
            run_file(**checkpointing(profile=True)),
            '"activation_checkpointing.profile": true is refused: a step is one program; `jspeed '
            "plan` shows what recomputation costs in it, and jax.profiler how long each part "
            "takes.",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_and_why(tree, message):
    with pytest.raises(ConfigError) as error:
        load_config(tree)
    assert str(error.value) == message

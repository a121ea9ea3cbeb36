"""jspeed/config/check.py: known keys, right types, required keys, the parameters of a type."""

import pytest

from jspeed.config import load_config
from jspeed.core.errors import ConfigError


def errors(tree) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config({"train_batch_size": 8, **tree})
    return str(error.value).split("\n")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"zero_optimization": {"stage3_prefetch_bukcet_size": 1}},
            '"zero_optimization.stage3_prefetch_bukcet_size": unknown key. '
            'Did you mean "stage3_prefetch_bucket_size"?',
        ),
        ({"gradient_cliping": 1}, '"gradient_cliping": unknown key. '
                                  'Did you mean "gradient_clipping"?'),
        ({"Gradient_Clipping": 1}, '"Gradient_Clipping": unknown key. '
                                   'Did you mean "gradient_clipping"?'),
        ({"stage3_max_live_parameters": 1}, '"stage3_max_live_parameters": unknown key. '
         'It belongs at "zero_optimization.stage3_max_live_parameters".'),
        ({"xyzzy": 1}, '"xyzzy": unknown key.'),
        ({"line\nbreak": 1}, '"line\\nbreak": unknown key.'),
        ({"\ud800": 1}, '"\\ud800": unknown key.'),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}},
         '"zero_optimization.offload_param.devise": unknown key. Did you mean "device"?'),
        ({"compression_training": {"weight_quantization": {"different_groups": {
            "a": {"params": {"start_bit": 8}}}}}},
         '"compression_training.weight_quantization.different_groups.a.params.start_bit": '
         'unknown key. Did you mean "start_bits"?'),
        ({"tensor_parallel": {"partition_config": {"layer_specs": [{}, {"pattern": "x"}]}}},
         '"tensor_parallel.partition_config.layer_specs[1].pattern": unknown key. '
         'Did you mean "patterns"?'),
    ],
)  # fmt: skip
def test_unknown_keys_at_every_level(tree, message):
    assert errors(tree) == [message]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"gradient_clipping": True}, '"gradient_clipping": true is not a number of at least 0. '
                                      "A boolean is not a number."),
        ({"gradient_clipping": "1.0"}, '"gradient_clipping": "1.0" is not a number of at least 0. '
                                       "Remove the quotes."),
        ({"gradient_clipping": -1}, '"gradient_clipping": -1 is not a number of at least 0.'),
        ({"gradient_clipping": None}, '"gradient_clipping": null is not a number of at least 0. '
                                      "Leave the key out for its default."),
        ({"gradient_accumulation_steps": 1.5},
         '"gradient_accumulation_steps": 1.5 is not an integer of at least 1.'),
        ({"gradient_accumulation_steps": 10**30},
         f'"gradient_accumulation_steps": {10**30}: it needs more than 64 bits; expected an '
         "integer of at least 1."),
        ({"bf16": {"enabled": 1}}, '"bf16.enabled": 1 is not true or false.'),
        ({"bf16": {"enabled": "True"}}, '"bf16.enabled": "True" is not true or false. '
                                        "Remove the quotes."),
        ({"bf16": True}, '"bf16": true is not an object with keys of its own.'),
        ({"zero_optimization": 3}, '"zero_optimization": 3 is not an object with keys of its own.'),
        ({"communication_data_type": "fp8"},
         '"communication_data_type": "fp8" is not one of "fp16", "bf16", "fp32".'),
        ({"dump_state": "auto"}, '"dump_state": "auto" is not true or false. "auto" has no meaning '
                                 "here; write a value or leave the key out."),
        ({"elasticity": {"micro_batch_sizes": [2, "4"]}},
         '"elasticity.micro_batch_sizes": [2, "4"] is not a list of values, each an integer of at '
         "least 1."),
        ({"tensor_parallel": {"partition_config": {"layer_specs": {}}}},
         '"tensor_parallel.partition_config.layer_specs": {} is not a list of objects.'),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}},
         '"optimizer.params.betas": [0.9]: has 1 values; expected a list of 2 values, each a '
         "number of at least 0 below 1."),
        ({"mesh": {"rules": [["a/.*", ["tensors"]]]}},
         '"mesh.rules": [["a/.*", ["tensors"]]]: rule 0: \'tensors\' is not a mesh axis (pipe, '
         "replica, data, expert, seq, tensor) or null; expected a list of rules like "
         '["blocks/.*/kernel", [null, null, "tensor"]].'),
        ({"mesh": {"rules": [["(", []]]}},
         '"mesh.rules": [["(", []]]: rule 0: the regex \'(\' does not compile: missing ), '
         "unterminated subpattern at position 0; expected a list of rules like "
         '["blocks/.*/kernel", [null, null, "tensor"]].'),
        ({"mesh": {"rules": [["a", ["tensor", "tensor"]]]}},
         '"mesh.rules": [["a", ["tensor", "tensor"]]]: rule 0 uses a mesh axis twice; expected a '
         'list of rules like ["blocks/.*/kernel", [null, null, "tensor"]].'),
    ],
)  # fmt: skip
def test_wrong_types_and_values(tree, message):
    assert errors(tree) == [message]


def test_exponents_are_integers():
    config = load_config({"train_batch_size": 8, "zero_optimization": {"reduce_bucket_size": 5e8}})
    assert config.zero.reduce_bucket_size == 500_000_000
    assert type(config.zero.reduce_bucket_size) is int


def test_all_problems_are_listed_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(
        '{"train_batch_size": 8,\n"bf16": {"enabled": 1},\n"x": 1,\n'
        '"zero_optimization": {"stage": 4, "stagee": 1}}'
    )
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == (
        '"bf16.enabled": 1 is not true or false. (line 2)\n'
        '"x": unknown key. (line 3)\n'
        '"zero_optimization.stage": 4 is not an integer from 0 to 3. (line 4)\n'
        '"zero_optimization.stagee": unknown key. Did you mean "stage"? (line 4)'
    )


def test_a_misspelt_key_is_not_reported_as_missing_too():
    assert errors({"train_batch_size": None, "train_batch_sise": 8}) == [
        '"train_batch_sise": unknown key. Did you mean "train_batch_size"?'
    ]
    assert errors({"run": {"dir": "x", "step": 3}}) == [
        '"run.step": unknown key. Did you mean "steps"?'
    ]


def test_required_keys_of_a_section():
    assert errors({"run": {"seed": 1}}) == [
        '"run.dir": missing; expected a string that is not empty.',
        '"run.steps": missing; expected an integer of at least 0.',
    ]
    assert errors({"optimizer": {"type": None, "params": {"lr": 1}}}) == [
        '"optimizer.type": missing; expected a string that is not empty.'
    ]
    assert errors({"scheduler": {"type": "OneCycle"}}) == [
        '"scheduler.params.cycle_min_lr": missing; expected a number of at least 0 or a list of 1 '
        "values, each a number of at least 0.",
        '"scheduler.params.cycle_max_lr": missing; expected a number of at least 0 or a list of 1 '
        "values, each a number of at least 0.",
    ]


def test_null_sections_are_absent_sections():
    config = load_config({"train_batch_size": 8, "optimizer": None, "zero_optimization": None,
                          "model": None})  # fmt: skip
    assert config.optimizer is None
    assert config.model is None
    assert config.zero.stage == 0


def test_parameters_belong_to_the_type_beside_them():
    assert errors({"optimizer": {"type": "SGD", "params": {"beta": [0.9, 0.99]}}}) == [
        '"optimizer.params.beta": unknown key.'
    ]
    assert errors({"optimizer": {"type": "Lion", "params": {"betas": [0.9, 1.0]}}}) == [
        '"optimizer.params.betas": [0.9, 1.0] is not a list of 2 values, each a number of at least '
        "0 below 1."
    ]
    assert errors({"optimizer": {"type": "Adan"}})[0].endswith('Did you mean "Adam"?')
    (message,) = errors({"scheduler": {"type": "Cosine"}})
    assert message.startswith(
        '"scheduler.type": "Cosine" is not a known scheduler: LRRangeTest, OneCycle, WarmupLR, '
        "WarmupDecayLR, WarmupCosineLR."
    )


def test_clipping_is_not_an_optimizer_parameter():
    assert errors({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}) == [
        '"optimizer.params.max_grad_norm": 1.0 is refused: clipping is not a parameter of the '
        'optimizer; use "gradient_clipping".'
    ]

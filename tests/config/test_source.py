"""jspeed/config/source.py: files, mappings, base64 and overrides."""

import base64
import json

import pytest

from jspeed.config import load_config
from jspeed.core.errors import ConfigError

SMALL = {"train_batch_size": 8, "zero_optimization": {"stage": 1}}


def error_of(source, overrides=()) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(source, overrides)
    return str(error.value)


def test_path_mapping_and_base64_give_the_same_configuration(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(SMALL))
    encoded = base64.urlsafe_b64encode(path.read_bytes()).decode()
    configs = [load_config(source) for source in (path, str(path), SMALL, encoded)]
    assert all(config == configs[0] for config in configs)
    assert configs[0].zero.stage == 1


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "ds_config.json").write_text("{}")
    wrong = tmp_path / "ds_confg.json"
    assert error_of(wrong) == f'"{wrong}": no such file. Did you mean "ds_config.json"?'


def test_sources_that_are_no_configuration(tmp_path):
    assert error_of(tmp_path) == f'"{tmp_path}": this is a folder, expected a JSON file.'
    binary = tmp_path / "model.bin"
    binary.write_bytes(b'{"a": "\xff"}')
    assert error_of(binary) == f'"{binary}": byte 7 is not UTF-8 text; is this a JSON file?'
    assert error_of(None) == (
        '"config": null is a Python NoneType, expected a path, a mapping or base64-encoded JSON.'
    )
    assert error_of("x" * 5000).startswith('"xxxx')
    assert error_of("a\0b").endswith("no such file.")


def test_the_source_mapping_is_left_alone():
    source = {"train_batch_size": 8, "zero_optimization": {"stage": 1}}
    load_config(source, ("zero_optimization.stage=2", "run.dir=x", "run.steps=3"))
    assert source == SMALL


def test_overrides_are_json_or_else_strings():
    config = load_config(
        SMALL,
        (
            "zero_optimization.stage=3",
            "run.dir=runs/a b",
            "run.steps=1e3",
            "gradient_clipping=0",
            'optimizer={"type": "SGD", "params": {"lr": 0.5}}',
            "optimizer.params.momentum=0.9",
            "train_batch_size=16",
        ),
    )
    assert (config.zero.stage, config.batch.train_batch_size) == (3, 16)
    assert config.run is not None
    assert (config.run.dir, config.run.steps) == ("runs/a b", 1000)
    assert config.gradient_clipping == 0
    assert config.optimizer is not None
    assert (config.optimizer.params["lr"], config.optimizer.params["momentum"]) == (0.5, 0.9)
    sources = {row.path: row.source for row in config.report}
    assert sources["zero_optimization.stage"] == "override"
    assert sources["optimizer.params.lr"] == "override"
    assert sources["zero_optimization.reduce_scatter"] == "default"


def test_a_single_override_needs_no_tuple():
    assert load_config(SMALL, "zero_optimization.stage=2").zero.stage == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps", '"run.steps": expected key=value, such as run.steps=10.'),
        ("run..steps=1", '"run..steps=1": expected key=value, such as run.steps=10.'),
        ("=1", '"=1": expected key=value, such as run.steps=10.'),
        (
            "train_batch_size.x=1",
            '"train_batch_size.x": cannot be set: "train_batch_size" is not an object.',
        ),
        (
            "zero_optimization.stagee=1",
            '"zero_optimization.stagee": unknown key. Did you mean "stage"?',
        ),
        (
            "zero_optimization.stage=7",
            '"zero_optimization.stage": 7 is not an integer from 0 to 3.',
        ),
        ("gradient_clipping=NaN", '"gradient_clipping": NaN is not a finite number.'),
        (
            "gradient_clipping=1, 2",
            '"gradient_clipping": "1, 2" is not a number of at least 0.',
        ),
    ],
)
def test_bad_overrides(override, message):
    assert error_of(SMALL, (override,)) == message


def test_an_override_cannot_smuggle_in_a_second_key():
    message = error_of(SMALL, ('gradient_clipping=1, "x": 2',))
    assert message.startswith('"gradient_clipping": "1, \\"x\\": 2" is not a number')

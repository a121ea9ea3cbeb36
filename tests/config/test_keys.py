"""The key table: complete against DeepSpeed's own keys, and consistent in itself."""

import json

import pytest

from jspeed.config import KEYS, Auto, Treatment, load_config
from jspeed.config import keys as keys_module
from jspeed.config.auto import RESOLVERS
from jspeed.config.key import Key
from jspeed.config.keys import TREE
from jspeed.config.keys_optimizer import OPTIMIZERS, SCHEDULERS, find_family
from jspeed.config.kinds import RefusedError
from tests.config.reference_keys import OPTIMIZER_PARAMS, OUTLINE, SCHEDULER_PARAMS


def outline() -> list[tuple[str, str | None]]:
    """The paths of the outline, with the text of their defaults."""
    stack: list[str] = []
    entries = []
    for line in OUTLINE.strip().split("\n"):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, default = line.strip().partition(" = ")
        stack[depth:] = [name]
        entries.append((".".join(stack), default or None))
    return entries


@pytest.mark.parametrize(("path", "default"), outline(), ids=[path for path, _ in outline()])
def test_every_deepspeed_key_is_in_the_table(path, default):
    node = TREE
    for segment in path.split("."):
        node = node.children[segment.removesuffix("[]")]
        node = node.item if segment.endswith("[]") else node
        assert node is not None
    if default is not None:
        assert node.key is not None
        assert KEYS[path].default == json.loads(default)


def test_no_path_stands_in_the_table_twice():
    assert len(keys_module._ALL) == len(KEYS)


def all_keys() -> list[Key]:
    families = [key for family in (*OPTIMIZERS, *SCHEDULERS) for key in family.params]
    return [*KEYS.values(), *families]


def test_every_default_is_null_or_a_value_of_its_key():
    for key in all_keys():
        if key.default is None:
            continue
        try:
            converted = key.kind.convert(key.default)
        except RefusedError:
            pytest.fail(f"{key.path}: {key.default!r} is not {key.kind.expected}")
        assert converted == key.default, key.path


def test_every_key_says_why():
    for key in all_keys():
        assert len(key.reason.split()) >= 2 or key.reason in ("momentum",), key.path
        assert not key.reason.endswith("."), key.path


def test_aliases_lead_to_keys_that_are_no_aliases():
    for key in KEYS.values():
        if key.alias_of is not None:
            assert KEYS[key.alias_of].alias_of is None, key.path


def test_exactly_the_keys_with_auto_from_facts_have_a_resolver():
    facts = {path for path, key in KEYS.items() if key.auto is Auto.FACTS and key.alias_of is None}
    assert facts == set(RESOLVERS)


def test_all_four_treatments_are_used_and_later_keys_are_off_by_default():
    assert {key.treatment for key in KEYS.values()} == set(Treatment)
    for key in KEYS.values():
        if key.treatment in (Treatment.LATER, Treatment.REFUSED):
            assert not key.switches_on(key.default), key.path


def _rows(text: str) -> list[tuple[str, dict]]:
    rows = []
    for line in text.strip().split("\n"):
        name, *params = line.split()
        pairs = (param.split("=") for param in params)
        rows.append((name, {key: json.loads(value) for key, value in pairs}))
    return rows


REQUIRED = {"total_num_steps": 10, "cycle_min_lr": 0.1, "cycle_max_lr": 0.2}


@pytest.mark.parametrize(
    ("section", "name", "params"),
    [("optimizer", *row) for row in _rows(OPTIMIZER_PARAMS)]
    + [("scheduler", *row) for row in _rows(SCHEDULER_PARAMS)],
)
def test_types_have_deepspeeds_parameters_and_defaults(section, name, params):
    family = find_family(OPTIMIZERS if section == "optimizer" else SCHEDULERS, name)
    assert family is not None
    needed = {key.path: REQUIRED[key.path] for key in family.params if key.required}
    given = {"type": name.upper(), "params": needed}
    config = load_config({"train_batch_size": 8, section: given})
    loaded = getattr(config, section)
    assert loaded.type == name
    got = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in loaded.params.items()
    }
    assert {key: got[key] for key in params} == params


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("FusedLamb", "Lamb"), ("FusedLion", "Lion"), ("DeepSpeedCPUAdam", "Adam"),
        ("onebit_adam", "OneBitAdam"), ("zero_one_adam", "ZeroOneAdam"), ("adamw", "AdamW"),
        ("sgd", "SGD"),
    ],
)  # fmt: skip
def test_spellings_of_optimizers(spelling, name):
    config = load_config({"train_batch_size": 8, "optimizer": {"type": spelling}})
    assert config.optimizer is not None
    assert config.optimizer.type == name

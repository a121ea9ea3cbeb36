"""Good configurations, damaged at random: each loads, or fails with one clear message.

`mutate` damages a file in one of many ways and tells what the message has to name, or None where
the damage may happen to be harmless.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jspeed.config import Config, load_config
from jspeed.config.keys import TREE, Node
from jspeed.config.kinds import Anything, Int, Number
from jspeed.config.parse import strip_comments
from jspeed.core.errors import ConfigError

GOOD = {
    path.stem: json.loads(strip_comments(path.read_text()))
    for path in sorted((Path(__file__).parent / "good").glob("*.json"))
}
Tree = dict[str, Any]
Place = tuple[str, Node, dict[str, Any], str]
Mutation = Callable[[random.Random, Tree], tuple[str, list[str] | None]]
"""Takes a configuration; returns the damaged text, and what the message has to contain."""


def places(tree: Tree, node: Node = TREE, path: str = "") -> list[Place]:
    """Every key of `tree` that the table knows by name: its path, node, object and name."""
    found: list[Place] = []
    for name, value in tree.items():
        child = node.children.get(name)
        if child is None:
            continue
        full = f"{path}.{name}" if path else name
        found.append((full, child, tree, name))
        if isinstance(value, dict):
            found.extend(places(value, child, full))
    return found


def named(path: str, *texts: str) -> list[str]:
    return [f'"{path}": ', *texts]


def misspell(rng: random.Random, tree: Tree):
    path, _, holder, name = rng.choice(places(tree))
    position = rng.randrange(len(name))
    wrong = name[:position] + "qz" + name[position + 1 :]
    holder[wrong] = holder.pop(name)
    return json.dumps(tree), named(path[: -len(name)] + wrong, "unknown key.")


def wrong_type(rng: random.Random, tree: Tree):
    known = [place for place in places(tree) if not accepts_anything(place)]
    path, node, holder, name = rng.choice(known)
    holder[name] = 17 if isinstance(holder[name], dict) or node.item is not None else [{}]
    return json.dumps(tree), named(path)


def accepts_anything(place: Place) -> bool:
    node = place[1]
    return node.key is not None and isinstance(node.key.kind, Anything)


def duplicate(rng: random.Random, tree: Tree):
    path, _, holder, name = rng.choice(places(tree))
    marker = "duplicate-goes-here"
    original = json.dumps(holder[name])
    holder[marker] = None
    text = json.dumps(tree).replace(f'"{marker}": null', f'"{name}": {original}')
    return text, named(path, "duplicate key, given twice")


def structure(text: str) -> list[int]:
    """The positions of brackets, quotes, colons and commas outside of strings' contents."""
    positions, inside, escaped = [], False, False
    for position, character in enumerate(text):
        if character == '"' and not escaped:
            inside = not inside
            positions.append(position)
        elif not inside and character in "{}[],:":
            positions.append(position)
        escaped = character == "\\" and not escaped
    return positions


def broken_json(rng: random.Random, tree: Tree):
    text = json.dumps(tree, indent=rng.choice([None, 2]))
    position = rng.choice(structure(text))
    return text[:position] + text[position + 1 :], ["not valid JSON", "line "]


def truncated(rng: random.Random, tree: Tree):
    text = json.dumps(tree, indent=2)
    return text[: rng.randrange(1, len(text) - 1)], ["not valid JSON", "line "]


PAIRS = [
    ("zero_optimization.cpu_offload", True, "zero_optimization.offload_optimizer.device", "none"),
    ("zero_optimization.cpu_offload_param", False, "zero_optimization.offload_param.device", "cpu"),
    ("bfloat16.check_grad_overflow", True, "bf16.check_grad_overflow", False),
    ("tensor_model_parallel_size", 2, "mesh.tensor", 4),
    ("sequence_parallel_size", 4, "mesh.seq", 1),
    ("pipeline_parallelism.num_stages", 2, "mesh.pipe", 3),
    ("zero_optimization.max_reuse_distance", 1, "zero_optimization.stage3_max_reuse_distance", 2),
]


def put(tree: Tree, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def contradiction(rng: random.Random, tree: Tree):
    old, old_value, new, new_value = rng.choice(PAIRS)
    put(tree, old, old_value)
    put(tree, new, new_value)
    return json.dumps(tree), named(old, f'contradicts "{new}": ')


def numbers_of(tree: Tree) -> list[Place]:
    return [
        place
        for place in places(tree)
        if place[1].key is not None and isinstance(place[1].key.kind, (Int, Number))
    ]


def negative(rng: random.Random, tree: Tree):
    bounded = [place for place in numbers_of(tree) if (place[1].key.kind.low or 0) >= 0]
    path, node, holder, name = rng.choice(bounded)
    has_bound = node.key.kind.low is not None or getattr(node.key.kind, "above", None) is not None
    holder[name] = -rng.choice([5, 0.5, 1e9])
    return json.dumps(tree), named(path) if has_bound else None


def not_finite(rng: random.Random, tree: Tree):
    path, _, holder, name = rng.choice(numbers_of(tree))
    holder[name] = "number-goes-here"
    number = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
    text = json.dumps(tree).replace('"number-goes-here"', number)
    return text, named(path, "is not a finite number.")


def wrong_triangle(rng: random.Random, tree: Tree):
    micro, steps = rng.randint(2, 9), rng.randint(2, 9)
    tree.pop("elasticity", None)
    tree["train_micro_batch_size_per_gpu"] = micro
    tree["gradient_accumulation_steps"] = steps
    tree["train_batch_size"] = micro * steps * rng.randint(1, 64) + 1
    return json.dumps(tree), named("train_batch_size", "hold: ")


def unknown_section(rng: random.Random, tree: Tree):
    name = "".join(rng.choices("jkqvwxyz_", k=rng.randint(5, 12)))
    tree[name] = rng.choice([{}, {"enabled": True}, 1, None, "auto"])
    return json.dumps(tree), named(name, "unknown key.")


def boolean_for_number(rng: random.Random, tree: Tree):
    path, _, holder, name = rng.choice(numbers_of(tree))
    holder[name] = rng.random() < 0.5
    return json.dumps(tree), named(path, "A boolean is not a number.")


def two_precisions(rng: random.Random, tree: Tree):
    tree.pop("bfloat16", None)
    put(tree, "bf16.enabled", True)
    put(tree, "fp16.enabled", True)
    return json.dumps(tree), named("fp16.enabled", "only one can be")


ODD_VALUES = [
    0, -1, 1, 2.5, 1e30, 10**40, "", "auto", "none", "x" * 500, "\u0000\ud800", True, False, None,
    [], [[]], [None], {}, {"a": 1}, {"enabled": True}, {"type": "Adam"},
]  # fmt: skip


def any_value(rng: random.Random, tree: Tree):
    _, _, holder, name = rng.choice(places(tree))
    holder[name] = rng.choice(ODD_VALUES)
    return json.dumps(tree), None


def removed(rng: random.Random, tree: Tree):
    _, _, holder, name = rng.choice(places(tree))
    del holder[name]
    return json.dumps(tree), None


def flipped(rng: random.Random, tree: Tree):
    characters = list(json.dumps(tree))
    for _ in range(rng.randint(1, 4)):
        characters[rng.randrange(len(characters))] = chr(rng.choice([*range(32, 127), 10, 0xE9, 0]))
    return "".join(characters), None


MUTATIONS: list[Mutation] = [
    misspell, wrong_type, duplicate, broken_json, truncated, contradiction, negative, not_finite,
    wrong_triangle, unknown_section, boolean_for_number, two_precisions, any_value, removed,
    flipped,
]  # fmt: skip


def outcome(source: Path | Tree, *overrides: str) -> tuple[Config | None, str]:
    """The configuration, or else the message of the one error that is allowed."""
    try:
        return load_config(source, overrides), ""
    except ConfigError as error:
        return None, str(error)


def check(seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    name = rng.choice(sorted(GOOD))
    mutation = rng.choice(MUTATIONS)
    text, expected = mutation(rng, json.loads(json.dumps(GOOD[name])))
    path = folder / "damaged.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    told = f"{mutation.__name__} of {name}"
    config, message = outcome(path)
    if config is not None:
        assert expected is None, f"{told} was accepted: {text}"
        assert load_config(config.to_dict()) == config, told  # what loads is whole
        return
    for line in message.split("\n"):
        assert line.startswith('"'), f"{told}: {line!r}"
    for part in expected or ():
        assert part in message, f"{told}: {part!r} is not in {message!r}"


@pytest.mark.parametrize("seed", range(200))
def test_damaged_files_load_or_fail_clearly(seed, tmp_path):
    check(seed, tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_random_overrides_load_or_fail_clearly(seed):
    rng = random.Random(seed)
    tree = GOOD[rng.choice(sorted(GOOD))]
    path, _, _, name = rng.choice(places(tree))
    value = rng.choice(
        ["1", "-1", "true", "null", "NaN", "[1, 2]", '{"a": 1}', "a b", "", '"', "#"]
    )
    override = f"{rng.choice([path, name, path + '.x', '.' + path])}={value}"
    config, message = outcome(tree, override)
    if config is None:
        assert all(line.startswith('"') for line in message.split("\n"))
    else:
        assert load_config(config.to_dict()) == config

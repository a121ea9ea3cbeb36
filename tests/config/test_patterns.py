"""Patterns of block-sparse attention: DeepSpeed's section, `model.attention`, and both together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jspeed.config import Config, SparseAttentionConfig, load_config
from jspeed.core.errors import ConfigError

MODEL = {"family": "bert", "layers": 2, "hidden_size": 64, "heads": 2, "sequence_length": 1024}


def load(*, attention: dict[str, Any] | None = None, family: str = "bert", **more: Any) -> Config:
    model = {**MODEL, "family": family, "attention": attention or {}}
    return load_config({"train_batch_size": 8, "model": model, **more})


def pattern(config: Config) -> SparseAttentionConfig | None:
    assert config.model is not None
    return config.model.attention.pattern


def test_without_either_there_is_no_pattern():
    for config in (load(), load(sparse_attention=None)):
        assert config.sparse_attention is None
        assert pattern(config) is None
        assert "sparse_attention" not in config.to_dict()


def test_an_empty_section_is_deepspeeds_default():
    """`fixed` on blocks of 16, in windows of 4 of which the last is global."""
    config = load(sparse_attention={})
    assert pattern(config) == config.sparse_attention == SparseAttentionConfig("fixed")
    config.require_trainable()


@pytest.mark.parametrize(
    "section",
    [
        {"mode": "dense", "block": 32},
        {"mode": "fixed", "num_local_blocks": 8, "num_global_blocks": 2,
         "different_layout_per_head": True, "num_different_global_patterns": 4},
        {"mode": "variable", "num_random_blocks": 2, "local_window_blocks": [1, 2],
         "global_block_indices": [0, 4], "global_block_end_indices": [1, 6],
         "horizontal_global_attention": True},
        {"mode": "bigbird", "block": 64, "num_random_blocks": 2, "num_global_blocks": 2,
         "num_sliding_window_blocks": 5},
        {"mode": "bslongformer", "global_block_indices": [1]},
    ],
    ids=lambda section: section["mode"],
)  # fmt: skip
def test_both_places_mean_the_same(section):
    theirs = load(sparse_attention=section)
    kind = {"kind" if name == "mode" else name: value for name, value in section.items()}
    ours = load(attention=kind)
    assert pattern(ours) == pattern(theirs) == theirs.sparse_attention
    assert ours.sparse_attention is None
    assert pattern(load(attention=kind, sparse_attention=section)) == pattern(ours)
    for name, value in section.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(pattern(ours), name) == expected
    for config in (ours, theirs):
        again = load_config(json.loads(json.dumps(config.to_dict())))
        assert (again, again.to_dict()) == (config, config.to_dict())


def test_a_sliding_window_and_a_seed_are_the_models_alone():
    config = load(attention={"kind": "bigbird", "num_random_blocks": 1, "seed": 7})
    assert pattern(config) == SparseAttentionConfig("bigbird", num_random_blocks=1, seed=7)
    window = pattern(load(attention={"kind": "local_sliding_window"}))
    assert window == SparseAttentionConfig("local_sliding_window")
    with pytest.raises(ConfigError, match=r'"sparse_attention\.seed": unknown key'):
        load(sparse_attention={"seed": 7})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_sees_nothing_behind_itself_unless_told_so(family):
    config = load(family=family, sparse_attention={"mode": "bigbird"})
    assert config.sparse_attention is not None
    assert config.sparse_attention.attention == "unidirectional"
    row = next(row for row in config.report if row.path == "sparse_attention.attention")
    assert (row.source, row.reason.partition(";")[0]) == ("default", f"{family} is a decoder")
    told = {"mode": "bigbird", "attention": "bidirectional"}
    kept = load(family=family, sparse_attention=told).sparse_attention
    assert kept == SparseAttentionConfig("bigbird")
    # Rows of global blocks have no unidirectional form.
    rows = {"horizontal_global_attention": True}
    assert load(family=family, sparse_attention=rows).sparse_attention == SparseAttentionConfig(
        "fixed", horizontal_global_attention=True
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sparse_attention": {"mode": "fixed", "num_random_blocks": 3}},
         '"sparse_attention.num_random_blocks": 3 means nothing to "mode": "fixed"; it belongs to '
         '"variable" and "bigbird". Remove it, or choose another pattern.'),
        ({"attention": {"kind": "local_sliding_window", "num_global_blocks": 2}},
         '"model.attention.num_global_blocks": 2 means nothing to "kind": "local_sliding_window"; '
         'it belongs to "fixed" and "bigbird". Remove it, or choose another pattern.'),
        ({"attention": {"kind": "dense", "attention": "unidirectional"}},
         '"model.attention.attention": "unidirectional" means nothing to "kind": "dense"; it '
         'belongs to "fixed" and "variable" and "bigbird" and "bslongformer" and '
         '"local_sliding_window". Remove it, or choose another pattern.'),
        ({"attention": {"block": 32}},
         '"model.attention.block": 32 is given, but no pattern beside it; say which with '
         '"model.attention.kind", or move it to "sparse_attention".'),
        ({"sparse_attention": {"mode": "bigbird"}, "attention": {"kind": "bslongformer"}},
         '"sparse_attention.mode": "bigbird" contradicts "model.attention.kind": "bslongformer". '
         "Say it in one of the two places."),
        ({"sparse_attention": {"mode": "bigbird"}, "attention": {"kind": "bigbird", "block": 64}},
         '"sparse_attention.block": 16 contradicts "model.attention.block": 64. Say it in one of '
         "the two places."),
        ({"sparse_attention": {"block": 48}},
         '"sparse_attention.block": 48 is no size of blocks; expected 16, 32, 64 or 128.'),
        ({"sparse_attention": {"num_global_blocks": 3}},
         '"sparse_attention.num_global_blocks": 3 does not divide '
         '"sparse_attention.num_local_blocks": 4.'),
        ({"sparse_attention": {"num_different_global_patterns": 2}},
         '"sparse_attention.num_different_global_patterns": 2 needs '
         '"sparse_attention.different_layout_per_head": true.'),
        ({"sparse_attention": {"num_different_global_patterns": 5}},
         '"sparse_attention.num_different_global_patterns": 5 is more than the 4 places of 1 '
         "global block(s) in a window of 4."),
        ({"sparse_attention": {"attention": "unidirectional", "horizontal_global_attention": True}},
         '"sparse_attention.horizontal_global_attention": true lets global blocks see what comes '
         'after them, against "attention": "unidirectional". Set one of them to the other.'),
        ({"sparse_attention": {"mode": "variable", "local_window_blocks": []}},
         '"sparse_attention.local_window_blocks": [] is no list of window sizes; expected at least '
         "one, each above 0."),
        ({"sparse_attention": {"mode": "bslongformer", "global_block_end_indices": [0]}},
         '"sparse_attention.global_block_end_indices": [0] does not fit '
         '"sparse_attention.global_block_indices": [0]; expected as many, each above its start.'),
        ({"attention": {"kind": "bigbird", "implementation": "cudnn"}},
         '"model.attention.implementation": "cudnn" has no block-sparse attention, which the '
         'pattern "bigbird" asks for. Use "auto".'),
        ({"attention": {"kind": "bigbird", "sequence_parallel": "allgather"}},
         '"model.attention.sequence_parallel": "allgather" does not see a pattern of blocks; use '
         '"ulysses" or "auto".'),
        ({"attention": {"sequence_parallel": "ring"}},
         '"model.attention.sequence_parallel": "ring" does not see what comes after a token; use '
         '"ulysses" or "auto".'),
    ],
)  # fmt: skip
def test_what_does_not_go_together(tree, message):
    with pytest.raises(ConfigError) as error:
        load(**tree)
    assert str(error.value) == message


def test_what_says_its_default_beside_another_pattern_is_no_error():
    """Files that list every key of DeepSpeed's with its default."""
    section = {"mode": "bigbird", "num_local_blocks": 4, "local_window_blocks": [4]}
    assert load(sparse_attention=section).sparse_attention == SparseAttentionConfig("bigbird")


@pytest.mark.parametrize("place", ["sparse_attention", "model.attention"])
def test_a_misspelt_pattern_is_one_problem(place):
    """Keys of the pattern that was meant are not judged by the default's."""
    keys = {"num_random_blocks": 2, "num_sliding_window_blocks": 5}
    places: dict[str, Any] = {
        "sparse_attention": {"sparse_attention": {"mode": "bigbrd", **keys}},
        "model.attention": {"attention": {"kind": "bigbrd", **keys}},
    }
    with pytest.raises(ConfigError) as error:
        load(**places[place])
    assert len(str(error.value).splitlines()) == 1
    assert "bigbrd" in str(error.value)


@pytest.mark.parametrize("place", ["sparse_attention", "model.attention"])
@pytest.mark.parametrize(
    ("pattern", "key", "words"),
    [
        ({"mode": "bigbird", "num_random_blocks": 65}, "num_random_blocks", "65 is more blocks"),
        (
            {"mode": "bigbird", "num_sliding_window_blocks": 67},
            "num_sliding_window_blocks",
            "67 is more blocks",
        ),
        ({"mode": "bigbird", "num_global_blocks": 70}, "num_global_blocks", "70 is more blocks"),
        ({"mode": "variable", "num_random_blocks": 65}, "num_random_blocks", "65 is more blocks"),
        (
            {"mode": "variable", "global_block_indices": [64, 90]},
            "global_block_indices",
            "[64, 90] lies past the end",
        ),
        (
            {"mode": "bslongformer", "global_block_indices": [64]},
            "global_block_indices",
            "[64] lies past the end",
        ),
    ],
)
def test_no_more_blocks_than_a_sequence_has(place, pattern, key, words):
    """Of 1,024 tokens in blocks of 16; reported before anything is built."""
    if place == "sparse_attention":
        asked: dict[str, Any] = {"sparse_attention": pattern}
    else:
        asked = {"attention": {"kind" if k == "mode" else k: v for k, v in pattern.items()}}
    with pytest.raises(ConfigError) as error:
        load(**asked)
    text = str(error.value)
    assert f'"{place}.{key}": {words}' in text
    assert '"model.sequence_length": 1024 has 64 block(s) of 16' in text


def test_the_data_s_sequences_count_where_they_are_shorter():
    window: dict[str, Any] = {"sparse_attention": {"mode": "bigbird", "num_random_blocks": 9}}
    load(**window)
    with pytest.raises(ConfigError, match=r'"data.sequence_length": 128 has 8 block\(s\) of 16'):
        load(**window, data={"source": "python-docs", "sequence_length": 128})


def test_as_many_blocks_as_there_are_and_some_past_the_end_will_do():
    for section in (
        {"mode": "bigbird", "num_random_blocks": 64, "num_global_blocks": 64},
        {"mode": "variable", "global_block_indices": [0, 64]},
        {"mode": "bslongformer", "num_sliding_window_blocks": 99},
    ):
        config = load(sparse_attention=section)
        assert pattern(config) == config.sparse_attention
        assert config.to_dict()["sparse_attention"].items() >= section.items()


def test_the_seed_is_the_models_whichever_place_names_the_pattern():
    section = {"mode": "bigbird", "num_random_blocks": 2}
    both = load(attention={"kind": "bigbird", "num_random_blocks": 2, "seed": 3},
                sparse_attention=section)  # fmt: skip
    assert pattern(both) == both.sparse_attention
    assert both.sparse_attention is not None
    assert both.sparse_attention.seed == 3

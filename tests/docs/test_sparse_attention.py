"""The patterns drawn in docs/sparse-attention.md are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jspeed.config import load_config
from jspeed.config.keys_attention import PATTERN_KEYS
from pallas_kernels import block_sparse_attention as patterns

PAGE = (Path(__file__).parents[2] / "docs" / "sparse-attention.md").read_text()
DRAWINGS = dict(re.findall(r"```text\n(\w+\(.*\))\n([█·\s]+)```", PAGE))


@pytest.mark.parametrize("expression", DRAWINGS)
def test_a_drawing_is_the_layout(expression):
    drawn = np.array([line.split() for line in DRAWINGS[expression].splitlines()]) == "█"
    pattern = eval(expression, vars(patterns))
    np.testing.assert_array_equal(drawn, pattern.layout(1, 16 * len(drawn)).mask[0])


def test_each_pattern_is_drawn_and_each_key_named():
    names = {name.partition("(")[0] for name in DRAWINGS}
    assert names == {"Fixed", "Variable", "BigBird", "BSLongformer", "LocalSlidingWindow"}
    assert [key.path for key in PATTERN_KEYS if f"`{key.path}`" not in PAGE] == []


def test_the_section_is_one():
    section = json.loads("{" + re.findall(r"```json\n(.*)\n```", PAGE)[0] + "}")
    config = load_config({"train_batch_size": 8, **section})
    assert config.sparse_attention is not None
    assert (config.sparse_attention.mode, config.sparse_attention.block) == ("bigbird", 64)

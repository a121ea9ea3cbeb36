"""What `jspeed.planner.testing` offers for users' own tests, as `docs/plan.md` shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jspeed.layout.mesh import resolve_mesh
from jspeed.planner.targets import has_gpu_compiler
from jspeed.planner.testing import compile_step
from tests.gpu_target.models import build, config

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]
PAGE = Path(__file__).parents[2] / "docs" / "plan.md"


def test_the_test_in_the_documentation_passes() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (example,) = [text for text in examples if "compile_step" in text]
    names: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec", dont_inherit=True), names)
    tests = [name for name in names if name.startswith("test_")]
    assert tests == ["test_zero_3_gathers_each_matrix_and_holds_an_eighth_of_the_state"]
    names[tests[0]]()


def test_a_compiled_step_tells_what_it_is_and_what_is_alive_at_its_peak() -> None:
    program, loss_fn = build("scanned", config(2, 64, heads=2, vocab=128, sequence=32))
    batch = dict.fromkeys(("input_ids", "labels"), ((1, 32), "int32"))
    step = compile_step(program, loss_fn, batch, shape=resolve_mesh(devices=4), stage=0)
    # 12 h^2 + 13 h a layer, two embeddings, the last norm.
    assert step.parameters == 2 * (12 * 64**2 + 13 * 64) + (128 + 32) * 64 + 2 * 64
    assert dict(step.sizes) == step.layout.sizes
    assert step.layout.sizes["data"] == 4
    state = 14 * step.parameters
    assert state <= step.argument_bytes <= state + 2 * 32 * 4 + 64
    assert step.alias_bytes >= state  # the state is donated
    assert step.temporary_bytes <= step.peak_bytes - step.argument_bytes
    assert 0 < max(value.bytes for value in step.live) <= step.temporary_bytes

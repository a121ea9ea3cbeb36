"""`docs/claims.md` is what the compiler says, and judging finds out what does not hold."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest

from benchmarks.claims import PAGE, compiled_plans, number, page, section, verdict
from benchmarks.literature import (
    CLAIMS,
    RUNS,
    Claim,
    Finding,
    optimizer_state,
    recomputation,
    volumes,
)
from jspeed.planner.targets import has_gpu_compiler

needs_gpu_compiler = pytest.mark.skipif(
    not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"
)


def claim(key: str) -> Claim:
    return next(one for one in CLAIMS if one.key == key)


@pytest.mark.gpu_target
@pytest.mark.slow
@needs_gpu_compiler
def test_the_optimizer_state_on_the_page_is_the_compilers() -> None:
    """A quarter on 4 devices and an eighth on 8; bytes of state are the same in all versions."""
    asked = claim("optimizer state")
    findings = asked.judge(compiled_plans(asked.runs))
    assert section(asked, findings) in PAGE.read_text(), "run: python -m benchmarks.claims"
    assert [one.holds for one in findings] == [True] * 4
    assert findings[1].found == pytest.approx(1 / 4, rel=1e-3)
    assert findings[2].found == pytest.approx(1 / 8, rel=1e-3)


@pytest.mark.slow
@pytest.mark.gpu_target
@needs_gpu_compiler
def test_the_page_is_what_the_command_writes() -> None:
    written_with = re.search(r"with\s+JAX\s+(\S+)", PAGE.read_text())
    assert written_with is not None
    if written_with.group(1) != jax.__version__:
        pytest.skip(f"the page was written with JAX {written_with.group(1)}")
    assert page(compiled_plans(tuple(RUNS))) == PAGE.read_text(), "run: python -m benchmarks.claims"


def test_every_run_checks_a_claim_and_every_claim_names_its_runs() -> None:
    assert {name for one in CLAIMS for name in one.runs} == set(RUNS)
    headings = re.findall(r"^## (.+)$", PAGE.read_text(), re.M)
    assert [heading.lower() for heading in headings] == [one.key.lower() for one in CLAIMS]


def held(master: float, moments: float) -> dict[str, Any]:
    return {"memory": {"master": master, "moments": moments}}


def test_optimizer_state_that_is_not_split_does_not_hold() -> None:
    plans = {
        "1.5B, stage 0": held(6e9, 12e9),
        "1.5B, stage 1 on 4": held(1.5e9, 3e9),
        "1.5B, stage 1 on 8": held(6e9, 1.5e9),  # the master stayed whole
    }
    assert [one.holds for one in optimizer_state(plans)] == [True, True, False, False]


def test_volume_is_judged_both_ways() -> None:
    plans = {
        f"7.5B, stage {stage}": {"volume": {"parameter_multiples": sent}}
        for stage, sent in enumerate((2.0, 2.0, 2.3, 2.5))
    }
    findings = volumes(plans)
    assert [one.holds for one in findings] == [True, True, False, False, False]
    assert findings[-1].found == 1.25


def test_activations_are_what_grows_with_the_batch() -> None:
    def plan(temporaries: float, flops: float) -> dict[str, Any]:
        return {"memory": {"temporaries": temporaries}, "flops": flops}

    plans = {
        "1.5B, 16 rows kept": plan(35e9, 1.5),
        "1.5B, 32 rows kept": plan(65e9, 3.0),
        "1.5B, 16 rows recomputed": plan(9e9, 2.0),
        "1.5B, 32 rows recomputed": plan(21e9, 4.5),
    }
    kept, recomputed, saved, products = recomputation(plans)
    assert (kept.found, recomputed.found) == (60.0, 24.0)
    assert (saved.found, saved.holds) == (0.6, True)
    assert (products.found, products.holds) == (0.5, False)
    assert (kept.holds, recomputed.holds) == (True, False)


def test_verdicts_and_numbers() -> None:
    right, wrong = (Finding("it", 1.0, 1.0, "", holds) for holds in (True, False))
    assert verdict([right, right]) == "holds"
    assert verdict([right, wrong, wrong]) == "1 of 3 figures agree"
    assert number(119.4, "GB") == "119 GB"
    assert number(2.0, "x parameters") == "2.00 x parameters"
    assert number(0.125, "") == "0.125"

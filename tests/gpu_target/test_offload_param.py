"""Layers' parameters in host memory, as compiled for H200s: devices hold less by exactly those and
the hosts that much more; each weight arrives while something else is computed, each layer's
gradients leave inside the backward loop, and the device's needs do not grow with the layers."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import pytest

from jspeed.config import load_config
from jspeed.planner.cluster import Cluster
from jspeed.planner.plan import Plan, make_plan
from jspeed.planner.targets import load_target
from jspeed.profile.compiled import Compiled
from tests.gpu_target.planned import plan_and_step
from tests.planner.goldens import CONFIGS

WIDTH, TOKENS = 1024, 64
SMALL = (
    f"model.hidden_size={WIDTH}",
    "model.heads=8",
    "model.vocab_size=1024",
    f"model.sequence_length={TOKENS}",
    f"data.sequence_length={TOKENS}",
    "train_micro_batch_size_per_gpu=1",
)
STACKED = 12 * WIDTH**2
"""Elements of a layer's four matrices; what is smaller stays on the device."""

pytestmark = pytest.mark.gpu_target


@functools.cache
def planned(param: str, gpus: int = 1, *more: str) -> tuple[Plan, Compiled]:
    offload = f"zero_optimization.offload_param.device={param}"
    return plan_and_step(gpus, "model.layers=4", f"train_batch_size={gpus}", *SMALL, offload, *more)


@dataclass(frozen=True)
class Copy:
    """An asynchronous copy between host memory and the device, in a loop.

    Attributes:
      elements: of one layer's slice.
      leaves: for host memory.
      products: matrix products between its start and its end.
    """

    elements: int
    leaves: bool
    products: int


def loops(text: str) -> list[list[Copy]]:
    """The copies of each loop of a scheduled module."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found = []
    for computation in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n)", text):
        name = re.match(r"%?([\w.\-]+) \(", computation)
        if name is not None and name.group(1) in bodies:
            found.append(_copies(computation.split("\n")[1:]))
    return found


def _copies(lines: list[str]) -> list[Copy]:
    copies = []
    for start, line in enumerate(lines):
        made = re.match(
            r"\s+%?(dynamic-(update-)?slice-start[\w.\-]*) = (.*?) fusion-start\(", line
        )
        if made is None or "S(5)" not in made.group(3):
            continue
        name = re.escape(made.group(1))
        done = re.compile(rf"fusion-done\([^)]*%?{name}\)")
        end = next(number for number, later in enumerate(lines) if done.search(later))
        sizes = re.findall(r"bf16\[1,([\d,]+)\]", made.group(3))
        elements = max(_product(size) for size in sizes)
        products = sum("matmul" in between for between in lines[start + 1 : end])
        copies.append(Copy(elements, made.group(2) is not None, products))
    return copies


def _product(sizes: str) -> int:
    product = 1
    for size in sizes.split(","):
        product *= int(size)
    return product


LAYOUTS = [
    (0, 1),
    pytest.param(1, 8, marks=pytest.mark.slow),
    pytest.param(2, 8, marks=pytest.mark.slow),
    pytest.param(3, 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "gpus"), LAYOUTS)
def test_devices_hold_less_by_the_layers_and_hosts_more(stage, gpus):
    """The hosts have besides room for the gradients, and no temporaries."""
    (_, without), (plan, compiled) = (
        planned(param, gpus, f"zero_optimization.stage={stage}") for param in ("none", "cpu")
    )
    held = 2 * 4 * STACKED // (gpus if stage == 3 else 1)
    left = 2 * 4 * STACKED // (gpus if stage else 1)
    assert without.argument_bytes - compiled.argument_bytes == held
    assert without.host_bytes == 0
    assert compiled.host_bytes == held + left
    parameters = plan.state.parameters
    of_state = 12 * parameters // (gpus if stage else 1)
    small = parameters - 4 * STACKED
    assert plan.memory.host - compiled.host_bytes == pytest.approx(of_state, abs=12 * small)
    assert "_xla_compute_type" not in compiled.text  # nothing is computed by the host


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_each_weight_comes_and_each_gradient_leaves_in_the_loops(remat):
    _, compiled = planned("cpu", 1, f"model.remat={remat}")
    forwards, backwards = loops(compiled.text)
    matrices = sorted(n * WIDTH**2 for n in (1, 3, 4, 4))
    fetched = [copy for copy in forwards if not copy.leaves]
    assert sorted(copy.elements for copy in forwards) == matrices
    assert all(copy.products for copy in fetched), fetched
    fetched = [copy for copy in backwards if not copy.leaves]
    left = [copy for copy in backwards if copy.leaves]
    assert sorted(copy.elements for copy in fetched) == matrices
    assert sorted(copy.elements for copy in left) == matrices
    hidden = sum(copy.elements for copy in (*fetched, *left) if copy.products)
    assert hidden >= 20 / 24 * sum(copy.elements for copy in (*fetched, *left))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_temporaries_stay_under_two_layers_beside_activations(remat):
    """Between 4 and 16 layers they grow by what is kept of each layer's activations alone."""
    few, many = (
        planned("cpu", 1, f"model.remat={remat}", f"model.layers={layers}")[1] for layers in (4, 16)
    )
    kept = TOKENS * WIDTH * 2 * (1 if remat == "full" else 30)
    assert many.temporary_bytes - few.temporary_bytes <= 12 * kept
    head = 4 * 1024 * WIDTH  # the table's gradient, fp32
    assert few.temporary_bytes < 2 * 2 * STACKED + 4 * kept + 2 * head


@pytest.mark.slow
def test_some_gathers_are_hidden_as_well():
    """At stage 3 a layer's part is fetched, then gathered, while another matrix is used."""
    _, compiled = planned("cpu", 8, "zero_optimization.stage=3", "model.remat=full")
    copies = [copy for loop in loops(compiled.text) for copy in loop if not copy.leaves]
    assert sum(bool(copy.products) for copy in copies) >= len(copies) / 2
    gathers = [overlap for overlap in compiled.overlaps if overlap.kind == "all-gather"]
    assert sum(g.count for g in gathers if g.matmuls) >= sum(g.count for g in gathers) / 3


@pytest.mark.slow
@pytest.mark.parametrize(("param", "fits"), [("none", False), ("cpu", True)])
def test_70_billion_parameters_fit_one_h100_only_with_it(param, fits):
    config = load_config(
        CONFIGS / "llama3_70b_1xh100.json",
        overrides=(f"zero_optimization.offload_param.device={param}",),
    )
    plan = make_plan(config, Cluster(load_target("h100-80"), 1, 1))
    assert plan.state.parameters > 70e9
    assert (plan.memory.headroom > 0) == fits
    assert (plan.memory.host > 16 * 68e9) == fits

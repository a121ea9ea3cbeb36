"""Layers' parameters on the disk, as compiled for H200s: devices hold less by exactly those, the
hosts' memory nothing of them, and the device's needs do not grow with the layers."""

from __future__ import annotations

import re

import pytest

from tests.gpu_target.test_offload_param import STACKED, TOKENS, WIDTH, planned

pytestmark = pytest.mark.gpu_target

DISK = "zero_optimization.offload_param.nvme_path=/local_nvme"
CALL = 'custom_call_target="xla_ffi_python_gpu_callback"'


@pytest.mark.parametrize(
    ("stage", "gpus"), [(0, 1), *(pytest.param(n, 8, marks=pytest.mark.slow) for n in (1, 2, 3))]
)
def test_devices_hold_less_by_the_layers_and_host_memory_nothing(stage: int, gpus: int) -> None:
    """Of their parameters and gradients; the plan counts both, of one device, as on the disk."""
    key = f"zero_optimization.stage={stage}"
    (_, without), (plan, compiled) = planned("none", gpus, key), planned("nvme", gpus, key, DISK)
    held = 2 * 4 * STACKED // (gpus if stage == 3 else 1)
    left = 2 * 4 * STACKED // (gpus if stage else 1)
    stand_ins = 2 * 4 * 4  # of four matrices and of their gradients
    assert without.argument_bytes - compiled.argument_bytes == pytest.approx(held, abs=stand_ins)
    assert compiled.host_bytes == without.host_bytes == 0
    assert plan.state.host_parameter_bytes == held + left
    assert plan.memory.host == plan.state.host_bytes
    assert any("from the disk" in remark for remark in plan.remarks)


def test_each_layer_is_asked_for_and_handed_over_in_the_loops() -> None:
    """By calls of the host with one layer's matrix; nothing has all layers' of any."""
    _, compiled = planned("nvme", 1, "zero_optimization.stage=0", DISK)
    sizes = sorted(n * WIDTH**2 for n in (1, 3, 4, 4))
    calls = [line for line in compiled.text.splitlines() if CALL in line]
    fetched = [_elements(line.split("custom-call(")[0]) for line in calls]
    left = [_elements(line.split("operand_layout_constraints=")[1]) for line in calls]
    assert sorted({n for n in fetched if n > 1}) == sorted(set(sizes))
    assert sorted(n for n in left if n > 1) == sizes  # once each: in the backward loop
    assert not re.search(rf"\[4,{WIDTH},(3,)?\d*{WIDTH}", compiled.text)


@pytest.mark.slow
def test_temporaries_stay_under_two_layers_beside_activations() -> None:
    """Between 4 and 16 layers they grow by what is kept of each layer's activations alone."""
    few, many = (
        planned("nvme", 1, "model.remat=full", f"model.layers={layers}", DISK)[1]
        for layers in (4, 16)
    )
    kept = TOKENS * WIDTH * 2
    assert many.temporary_bytes - few.temporary_bytes <= 12 * kept
    head = 4 * 1024 * WIDTH  # the table's gradient, fp32
    assert few.temporary_bytes < 2 * 2 * STACKED + 4 * kept + 2 * head


def _elements(text: str) -> int:
    """Of the largest array in a line."""
    sizes = [1]
    for shape in re.findall(r"\[([\d,]+)\]", text):
        product = 1
        for size in shape.split(","):
            product *= int(size)
        sizes.append(product)
    return max(sizes)

"""Peaks by the name of a device."""

from __future__ import annotations

import pytest

from jspeed.planner.targets import load_target
from jspeed.profile.peaks import peak_flops


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA B200", "b200"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_peaks_are_those_of_the_targets(kind: str, target: str, dtype: str) -> None:
    assert peak_flops(kind, dtype) == load_target(target).peak_flops(dtype)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H2000", "TPU v5e"])
def test_of_other_devices_nothing_is_made_up(kind: str) -> None:
    assert peak_flops(kind, "bfloat16") is None

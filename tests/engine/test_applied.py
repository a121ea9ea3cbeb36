"""Who applies Adam, by optimizer, stage and devices."""

from __future__ import annotations

import jax
import pytest

from jspeed.config import load_config
from jspeed.engine.build import mesh_shape, plan_run
from jspeed.layout.mesh import make_mesh
from jspeed.models import ModelFactory
from jspeed.planner.targets import described_mesh, has_gpu_compiler
from jspeed.training.program import make_program
from pallas_kernels.fused_adamw import InPlaceTransformation
from tests.training.curves import TINY, ds_config


def in_place(optimizer, stage, devices, *, gpu):
    config = load_config(ds_config(stage=stage, micro=1, optimizer=optimizer))
    shape = mesh_shape(config, devices)
    mesh = described_mesh("h200", shape) if gpu else make_mesh(shape, jax.devices()[:devices])
    plan = plan_run(config, make_program(ModelFactory("gpt2", TINY)), mesh)
    return isinstance(plan.optimizer, InPlaceTransformation)


@pytest.mark.gpu_target
@pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing")
def test_on_gpus_by_what_moves_fewer_bytes():
    for stage in (0, 3):
        assert not in_place("AdamW", stage, 4, gpu=True)
        assert in_place("FusedAdam", stage, 4, gpu=True)
    for stage in (1, 2):
        assert in_place("Adam", stage, 4, gpu=True)
        assert in_place("AdamW", stage, 4, gpu=True)
        assert not in_place("AdamW", stage, 1, gpu=True)
        assert not in_place("Lion", stage, 4, gpu=True)


def test_never_on_cpus():
    assert not in_place("FusedAdam", 2, 4, gpu=False)

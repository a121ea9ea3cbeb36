"""`jspeed report`: what is there, what is not, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import os

import jax
import pytest

from jspeed.cli import report
from tests.cli.processes import jspeed


def checks(found) -> dict[str, report.Check]:
    return {check.name: check for check in found}


def test_this_machine():
    ran = jspeed("report", "--json", JAX_NUM_CPU_DEVICES="3")
    found = {(check["group"], check["name"]): check for check in json.loads(ran.out)}
    assert found["software", "jax"]["found"] == jax.__version__
    assert found["devices", "JAX"]["found"] == "3 x cpu"
    assert found["host", "compile cache"]["state"] == "OK"
    missing = [check for check in found.values() if check["state"] == "missing"]
    assert ran.code == bool(missing), missing
    assert all(check["advice"] for check in missing)


def test_the_page_has_all_of_it():
    ran = jspeed("report")
    for text in ("software", "orbax-checkpoint", "NVIDIA", "driver", "compile cache", "extras"):
        assert text in ran.out


def test_what_is_missing_says_what_to_do(monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("optax", "numba"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "jaxlib" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    software = checks(report._software())
    assert (software["optax"].state, software["optax"].advice) == ("missing", "pip install optax")
    assert software["jaxlib"].advice == f"pip install jaxlib=={jax.__version__}"
    extras = checks(report._extras())
    assert extras["offload"].state == "absent"
    assert extras["offload"].advice == 'pip install "jspeed[offload]"'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('raise ImportError("libfoo.so.1: no such file")',
         "import jax: ImportError: libfoo.so.1: no such file"),
        ("1 / 0", "import jax: ZeroDivisionError: division by zero"),
        ("def devices(): raise RuntimeError('no devices here')", "no devices here"),
    ],
)  # fmt: skip
def test_a_jax_that_is_broken_is_a_line_of_the_report(tmp_path, text, found):
    (tmp_path / "jax.py").write_text(text)
    ran = jspeed("report", "--json", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert ran.code == 1, ran.err
    lines = {check["name"]: check for check in json.loads(ran.out)}
    assert lines["JAX"]["state"] == "missing"
    assert found in lines["JAX"]["found"]
    assert lines["JAX"]["advice"]
    assert lines["Python"]["state"] == lines["cores"]["state"] == "OK"


def test_an_accelerator_that_jax_does_not_use(monkeypatch):
    monkeypatch.setattr(report, "has_driver", lambda: True)
    monkeypatch.setattr(report, "has_accelerator", lambda: False)
    found = checks(report._devices())["accelerator"]
    assert found.state == "missing"
    assert 'pip install "jspeed[cuda12]"' in found.advice


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = report._compile_cache(tmp_path / "none" / "xla")
    assert found.state == "missing"
    assert "JAX_COMPILATION_CACHE_DIR" in found.advice


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNV18\t X", "NVLink (NV18)"),
        ("\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X", "PHB"),
        ("\tGPU0\nGPU0\t X", "one GPU"),
    ],
)
def test_the_topology(said, expected, tmp_path):
    tool = tmp_path / "nvidia-smi"
    (tmp_path / "said").write_text(said)
    tool.write_text(f'#!/bin/sh\ncat "{tmp_path}/said"\n')
    tool.chmod(0o755)
    assert report._topology(str(tool)).found == expected

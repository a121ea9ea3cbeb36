from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jspeed.cli import environment
from jspeed.cli.environment import device_overrides, mesh_devices, prepare_jax, without_noise
from jspeed.config import Config, load_config
from jspeed.core.errors import ConfigError
from tests.cli.processes import environment as clean
from tests.cli.processes import jspeed, tiny_run, write


def config(**mesh: Any) -> Config:
    return load_config({"train_micro_batch_size_per_gpu": 1, "mesh": mesh})


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without a driver whose user has set nothing."""
    monkeypatch.setattr(environment, "has_accelerator", lambda: False)
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        # Set first: only then is what the code under test puts there removed again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_devices_of_a_mesh() -> None:
    assert mesh_devices(config()) is None
    assert mesh_devices(config(tensor=2)) is None
    assert mesh_devices(config(data=4, tensor=2, replica=3)) == 24


def test_the_data_axis_follows_the_devices_asked_for() -> None:
    assert device_overrides(config(data=8), 4) == ["mesh.data=-1"]
    assert device_overrides(config(data=8), 8) == []
    assert device_overrides(config(tensor=2), 4) == []


@pytest.mark.parametrize(
    ("mesh", "devices", "already", "expected"),
    [
        ({"data": 4}, None, None, "4"),
        ({"data": 4}, None, "8", "8"),
        ({"data": 4}, 2, "8", "2"),
        ({}, 2, None, "2"),
        ({}, None, None, None),
    ],
)
def test_the_cpu_is_cut_into_the_devices_of_the_mesh(
    no_driver: pytest.MonkeyPatch,
    mesh: dict[str, int],
    devices: int | None,
    already: str | None,
    expected: str | None,
) -> None:
    if already is not None:
        no_driver.setenv("JAX_NUM_CPU_DEVICES", already)
    prepare_jax(config(**mesh), devices)
    assert os.environ.get("JAX_NUM_CPU_DEVICES") == expected
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    ("driver", "installed", "usable"),
    [
        ("/dev/nvidia0", set(), False),
        ("/dev/nvidia0", {"jax-cuda13-plugin"}, False),  # compiles, but has no CUDA to run on
        ("/dev/nvidia0", {"nvidia-cublas-cu12"}, True),
        ("/dev/nvidia0", {"nvidia-cublas"}, True),
        ("/dev/kfd", {"nvidia-cublas"}, False),
        ("/dev/kfd", {"jax-rocm7-plugin"}, True),
        ("/nothing", {"nvidia-cublas"}, False),
    ],
)
def test_an_accelerator_is_one_that_jax_can_use(
    monkeypatch: pytest.MonkeyPatch, driver: str, installed: set[str], usable: bool
) -> None:
    monkeypatch.delenv("TPU_NAME", raising=False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == driver)
    monkeypatch.setattr(environment, "_is_installed", lambda name: name in installed)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert environment.has_accelerator() is usable


def test_an_accelerator_that_jax_cannot_use_leaves_the_cpu(
    no_driver: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_driver.setattr(environment, "has_driver", lambda: True)
    prepare_jax(config(data=4))
    assert (os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"]) == ("cpu", "4")
    assert "the installed JAX cannot use it: running on the CPU" in capsys.readouterr().err


def test_a_wrong_xla_flag_is_named(tmp_path: Path) -> None:
    run = write(tmp_path / "run.json", tiny_run(tmp_path / "run"))
    result = jspeed("train", run, XLA_FLAGS="--xla_no_such_flag=1")
    assert result.code != 0
    assert "xla_no_such_flag" in result.err


def test_virtual_devices_are_not_silently_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_accelerator", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ConfigError) as error:
        prepare_jax(config(), 4)
    assert str(error.value) == (
        '"--devices": 4 virtual CPU devices were asked for, but this machine has an accelerator. '
        'Set JAX_PLATFORMS=cpu to use the CPU, or leave "--devices" out.'
    )


@pytest.mark.parametrize(
    ("variable", "value", "share"),
    [
        (None, "", ".90"),
        ("XLA_CLIENT_MEM_FRACTION", ".5", ".5"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", ".6", None),  # JAX refuses both together
    ],
)
def test_xla_gets_the_share_of_memory_that_plans_count_on(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, value: str, share: str | None
) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(environment, "has_accelerator", lambda: True)
    monkeypatch.setattr(environment, "_import_jax", lambda: None)
    environment.prepare_jax(load_config({"train_batch_size": 8}))
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == share
    os.environ.pop("XLA_CLIENT_MEM_FRACTION", None)


def test_only_noise_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with without_noise() as heard:
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written")
        os.write(2, b" to STDERR\nI0000 cudart_stub.cc:31] Could not find cuda drivers\n")
        os.write(2, b"E0000 out of memory\n")
        assert heard() == "E0000 out of memory\n"
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "E0000 out of memory\n"


def test_what_was_heard_can_be_taken(capfd: pytest.CaptureFixture[str]) -> None:
    with without_noise() as heard:
        os.write(2, b"a long story\n")
        assert heard(clear=True) == "a long story\n"
        os.write(2, b"an afterword\n")
    assert capfd.readouterr().err == "an afterword\n"


def test_an_error_while_quiet_leaves_standard_error_as_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        with without_noise():
            os.write(2, b"before\n")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_jax_starts_quietly_without_a_driver() -> None:
    if environment.has_accelerator():
        pytest.skip("this machine has a driver")
    code = (
        "from jspeed.cli.environment import prepare_jax\n"
        "from jspeed.config import load_config\n"
        "prepare_jax(load_config({'train_batch_size': 4, 'mesh': {'data': 4}}))\n"
        "import jax; print(jax.device_count(), jax.devices()[0].platform)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean(), check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4 cpu\n", "")


def test_a_platform_that_cannot_start_is_one_clear_message(tmp_path: Path) -> None:
    if environment.has_accelerator():
        pytest.skip("this machine has a driver")
    ran = jspeed("train", write(tmp_path / "run.json", tiny_run(tmp_path)), JAX_PLATFORMS="cuda")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(
        "jspeed: \"JAX_PLATFORMS\": 'cuda' is set, but JAX cannot start there"
    )
    assert ran.err.endswith("Unset it to run on the CPU.\n")
    assert "Traceback" not in ran.err

"""Targets: what they say, whence, and what a wrong file is answered."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jspeed.core.errors import JspeedError, MissingExtraError
from jspeed.layout.mesh import AXES, MeshShape
from jspeed.planner.targets import (
    TARGETS,
    described_devices,
    described_mesh,
    has_gpu_compiler,
    known_targets,
    load_target,
    target_data,
)
from jspeed.planner.targets.load import measured_path
from jspeed.planner.targets.target import EFFICIENCIES
from jspeed.planner.targets.text_proto import text_proto
from jspeed.profile.collectives import collectives
from jspeed.profile.compiled import compile_uncached
from jspeed.profile.costs import FULL_FLOAT32

needs_gpu_compiler = pytest.mark.skipif(
    not has_gpu_compiler(), reason="the CUDA compiler plugin is not installed"
)


def test_known_targets() -> None:
    assert TARGETS == ("h100-80", "h200", "a100-40", "a100-80", "b200")
    assert known_targets() == (*TARGETS, "h100", "a100", "cpu")


@pytest.mark.parametrize("name", TARGETS)
def test_every_figure_has_a_source(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    figures = {
        *("memory_bytes", "usable_fraction", "memory_bandwidth", "launch_seconds", "compiler"),
        *(f"flops.{dtype}" for dtype in target.flops),
        *(f"efficiency.{what}" for what in EFFICIENCIES),
        *(f"{link}.bandwidth" for link in ("device_link", "network", "host_link")),
        *(f"{link}.latency" for link in ("device_link", "network", "host_link")),
    }
    assert set(target.sources) == figures
    assert all(len(source) > 10 for source in target.sources.values())


@pytest.mark.parametrize(
    ("name", "terabytes_per_second", "bf16", "nvlink", "gib"),
    [
        ("h100-80", 3.35, 989.4, 450, 79.1),
        ("h200", 4.8, 989.4, 450, 140.4),
        ("a100-40", 1.555, 312, 300, 39.4),
        ("a100-80", 2.039, 312, 300, 79.1),
        ("b200", 7.67, 2250, 900, 178.4),
    ],
)
def test_datasheet_figures(
    name: str, terabytes_per_second: float, bf16: float, nvlink: float, gib: float
) -> None:
    target = load_target(name)
    assert target.memory_bandwidth / 1e12 == pytest.approx(terabytes_per_second, rel=1e-3)
    assert target.peak_flops("bfloat16") / 1e12 == bf16
    assert target.device_link.bandwidth / 1e9 == nvlink
    assert target.memory_bytes / 2**30 == pytest.approx(gib, abs=0.05)
    # The rest is the runtime's: at least a context and NCCL's buffers, at most a quarter.
    assert 3 * 2**30 < target.memory_bytes - target.limit_bytes < target.memory_bytes / 4


def test_rates_by_dtype() -> None:
    h200, a100 = load_target("h200"), load_target("a100")
    assert h200.peak_flops("float32") == 494.7e12  # JAX takes TF32 unless HIGHEST is asked for
    assert h200.peak_flops(FULL_FLOAT32) == 66.9e12
    assert h200.peak_flops("float8_e4m3fn") == h200.peak_flops("float8_e5m2") == 1978.9e12
    assert a100.peak_flops("float8_e4m3fn") == a100.peak_flops("int32") == 19.5e12
    assert h200.matmul_flops("bfloat16") == pytest.approx(791.5e12, rel=1e-3)
    assert h200.memory_rate() == pytest.approx(4.32e12)
    assert h200.device_link_rate() == pytest.approx(369e9)
    assert h200.network_rate() == pytest.approx(42.5e9)


def test_names_in_any_case_and_short() -> None:
    assert load_target("H200") == load_target("h200")
    assert load_target("H100").name == "h100-80"
    assert load_target("a100").name == "a100-80"


def test_compiler_description() -> None:
    text = load_target("a100-40").compiler
    assert text is not None
    assert "  core_count: 108\n" in text
    assert "  cuda_compute_capability {\n    major: 8\n    minor: 0\n  }\n" in text
    # The figures of the target, not a second copy of them.
    assert "  device_memory_size: 42298834944\n" in text
    assert "  memory_bandwidth: 1555000000000\n" in text
    assert text.endswith('device_description_str: "NVIDIA A100-SXM4-40GB"\n')
    assert "source" not in text


def test_text_proto() -> None:
    text = text_proto({"a": {"b": 1, "c": {"d": 1.98}}, "e": 'x"y', "f": True})
    assert text == 'a {\n  b: 1\n  c {\n    d: 1.98\n  }\n}\ne: "x\\"y"\nf: true\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("h20", "Target 'h20' is unknown. Did you mean 'h200'? Known: h100-80, h200, "),
        ("xyz", "Target 'xyz' is unknown. Known: "),
        ("./none.json", '"none.json": no such file. Name a target file or one of h100-80, '),
    ],
)
def test_unknown_names(name: str, text: str) -> None:
    with pytest.raises(JspeedError) as caught:
        load_target(name)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_cpu_that_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured_path() == tmp_path / "jspeed" / "targets" / "cpu.json"
    with pytest.raises(JspeedError, match=r"not measured yet.*: jspeed targets --measure$"):
        load_target("cpu")


def write(path: Path, data: Any) -> str:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_a_file_that_extends_a_target(tmp_path: Path) -> None:
    own = {
        "extends": "H200",
        "description": "our H200s, capped",
        "memory_bytes": {"value": 100 * 2**30, "source": "our scheduler"},
        "network": {"bandwidth": {"value": 25e9, "source": "our network"}},
        "flops": {"bfloat16": {"value": 700e12, "source": "measured"}},
    }
    target, h200 = load_target(write(tmp_path / "ours.json", own)), load_target("h200")
    assert (target.name, target.description) == ("ours", "our H200s, capped")
    assert target.limit_bytes == 90 * 2**30
    assert target.network.bandwidth == 25e9
    assert target.network.latency == h200.network.latency
    assert target.flops == {**h200.flops, "bfloat16": 700e12}
    assert target.sources["network.bandwidth"] == "our network"
    assert target.sources["network.latency"] == h200.sources["network.latency"]
    assert target.compiler is not None
    assert f"device_memory_size: {100 * 2**30}\n" in target.compiler


def test_target_data_is_a_file_of_its_own(tmp_path: Path) -> None:
    data = target_data("b200")
    assert "extends" not in data
    path = write(tmp_path / "mine.json", data)
    assert load_target(path) == dataclasses.replace(load_target("b200"), name="mine")


def changed(*path: str, value: Any) -> dict[str, Any]:
    """The data of an H200 with one thing put in place of another, or left out (None)."""
    data = target_data("h200")
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


def figure(value: Any, source: Any = "somewhere") -> dict[str, Any]:
    return {"value": value, "source": source}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("{", "no JSON: Expecting property name enclosed in double quotes (line 1)."),
        ("[" * 100_000, "no JSON: nested too deeply."),
        ([1], "expected a JSON object with the figures of a target."),
        (changed("flops", "float32", value=None), '"flops.float32": missing; write {"value": '),
        (changed("memory_bytes", value=None), '"memory_bytes": missing; write {"value": NUMBER, '),
        (changed("network", "latency", value=None), '"network.latency": missing; '),
        (changed("network", value=3), '"network": expected an object, got 3.'),
        (changed("compiler", value=None), '"compiler": missing; '),
        (changed("compiler", value={}), '"compiler": expected an object with "source" and '),
        (
            changed("compiler", "gpu_device_info", value={}),
            '"compiler.gpu_device_info.cuda_compute_capability": missing; ',
        ),
        (
            changed("compiler", "gpu_device_info", "core_count", value=[1]),
            '"compiler.gpu_device_info.core_count": expected a number or text, got [1].',
        ),
        (changed("platform", value="tpu"), '"platform": expected one of cuda, cpu, got "tpu".'),
        (changed("description", value=7), '"description": expected text, got 7.'),
        (
            changed("memory_bandwidth", value=4.8e12),
            '"memory_bandwidth": expected a figure with its source, got 4800000000000.0; write ',
        ),
        (
            changed("memory_bandwidth", value=figure("fast")),
            '"memory_bandwidth": expected a number, got "fast".',
        ),
        (
            changed("memory_bandwidth", value=figure(True)),
            '"memory_bandwidth": expected a number, got true.',
        ),
        (
            changed("flops", "bfloat16", value=figure(-1)),
            '"flops.bfloat16": expected a number above 0, got -1.',
        ),
        (
            changed("flops", "bfloat16", value=figure(float("nan"))),
            '"flops.bfloat16": expected a number above 0, got NaN.',
        ),
        (
            changed("memory_bandwidth", value=figure(1, " ")),
            '"memory_bandwidth": expected a source, got " "; say where it is from.',
        ),
        (
            changed("efficiency", "matmul", value=figure(1.2)),
            '"efficiency.matmul": expected a share of at most 1, got 1.2.',
        ),
        (
            changed("efficiency", "matmull", value=figure(1)),
            '"efficiency.matmull": unknown key. Did you mean "matmul"?',
        ),
        ({"extends": "h200", "netwrok": {}}, '"netwrok": unknown key. Did you mean "network"?'),
        ({"extends": "h20"}, "\"extends\": 'h20' is none of h100-80, h200, a100-40, "),
        ({"extends": 3}, '"extends": expected the name of a target.'),
    ],
)
def test_files_that_are_wrong(data: Any, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "ours.json", data)
    with pytest.raises(JspeedError) as caught:
        load_target(path)
    assert str(caught.value).startswith(f'"{path}": {text}')
    assert "\n" not in str(caught.value)


def test_no_latency_is_allowed(tmp_path: Path) -> None:
    data = changed("host_link", "latency", value=figure(0))
    assert load_target(write(tmp_path / "ours.json", data)).host_link.latency == 0


def test_without_the_compiler_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert not has_gpu_compiler()
    with pytest.raises(MissingExtraError) as caught:
        described_devices("h200", 8)
    assert 'pip install "jspeed[gpu-target]"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cpu_cannot_be_described() -> None:
    cpu = dataclasses.replace(load_target("h200"), name="cpu", platform="cpu", compiler=None)
    with pytest.raises(JspeedError, match="Target 'cpu' is no GPU"):
        described_devices(cpu, 2)


@needs_gpu_compiler
@pytest.mark.gpu_target
def test_a_description_that_xla_cannot_read() -> None:
    h200 = load_target("h200")
    assert h200.compiler is not None
    damaged = dataclasses.replace(h200, compiler=h200.compiler + "no_such_field: 1\n")
    with pytest.raises(JspeedError, match=r"^Target 'h200': XLA cannot read .* \"compiler\""):
        described_devices(damaged, 1)


@needs_gpu_compiler
def test_a_plugin_that_jax_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("no PJRT plugin for cuda\nmore")

    monkeypatch.setattr(topologies, "get_topology_desc", fails)
    with pytest.raises(JspeedError) as caught:
        described_devices("h200", 1)
    assert str(caught.value) == (
        "The installed CUDA compiler plugin cannot be used: no PJRT plugin for cuda. It must be of "
        'JAX\'s own version: pip install --upgrade "jspeed[gpu-target]"'
    )


@needs_gpu_compiler
@pytest.mark.gpu_target
def test_gpus_that_do_not_fill_hosts() -> None:
    with pytest.raises(JspeedError, match=r"12 GPUs do not fill hosts of 8. Use a multiple of 8."):
        described_devices("h200", 12)
    assert len(described_devices("h200", 4)) == 4


@needs_gpu_compiler
@pytest.mark.gpu_target
@pytest.mark.parametrize("name", TARGETS)
def test_every_target_compiles(name: str) -> None:
    mesh = described_mesh(name, MeshShape(data=8))
    assert mesh.axis_names == AXES
    over_data = NamedSharding(mesh, P("data"))
    argument = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=over_data)
    compiled = compile_uncached(jax.jit(jnp.matmul).lower(argument, argument))
    # Rows of the result stay where they are; the second matrix is needed whole.
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 1024 * 1024 * 2 // 8
    found = collectives(compiled.as_text(), dict(mesh.shape))
    assert [(each.kind, each.axes, each.count) for each in found] == [("all-gather", ("data",), 1)]
    assert mesh.devices.flat[0].device_kind.startswith(f"NVIDIA {name[:4].upper()}")

"""`jspeed targets`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jspeed.cli.targets import rate_text, seconds_text, targets_command
from jspeed.core.errors import ConfigError
from jspeed.planner import measure
from jspeed.planner.targets import TARGETS, load_target
from tests.cli.processes import jspeed
from tests.planner.test_measure import CORE, LINK

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was not measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time."""
    monkeypatch.setattr(
        measure, "_measured", lambda name, devices=1: LINK if devices == 2 else CORE
    )


def printed(
    capsys: pytest.CaptureFixture[str],
    name: str | None = None,
    *,
    as_json: bool = False,
    measure: bool = False,
    output: Path | None = None,
) -> str:
    targets_command(name, as_json=as_json, measure=measure, output=output)
    return capsys.readouterr().out


def test_all_targets(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == list(TARGETS)
    assert re.match(
        r"h200 +140\.4 GiB +989\.4 TFLOP/s +494\.7 TFLOP/s +4\.8 TB/s +450 GB/s +50 GB/s +"
        r"NVIDIA H200 SXM, 141 GB HBM3e",
        lines[2],
    )
    assert "cpu, this machine, was not measured yet: jspeed targets --measure" in lines
    assert any(line.startswith("Also: h100 is h100-80, a100 is a100-80;") for line in lines)


def test_one_target(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "A100-40")
    assert text.startswith("a100-40: NVIDIA A100 SXM4, 40 GB HBM2\n")
    for figure in load_target("a100-40").sources:
        assert re.search(rf"^{re.escape(figure)} +[\d.]+", text, re.MULTILINE), figure
    assert re.search(r"^memory_bandwidth +1\.555 TB/s +NVIDIA A100 datasheet, SXM4: ", text, re.M)
    assert text.rstrip().endswith("35.5 GiB for a program's arrays on each GPU.")


def test_json_of_one_is_a_target_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(printed(capsys, "h200", as_json=True))
    mine = load_target(str(path))
    assert (mine.compiler, mine.flops) == (load_target("h200").compiler, load_target("h200").flops)


def test_json_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(printed(capsys, as_json=True))
    assert list(data) == list(TARGETS)
    assert data["b200"]["memory_bandwidth"]["value"] == 7672320000000


@pytest.mark.usefixtures("quick")
def test_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, measure=True)
    assert f"Written to {tmp_path / 'cache' / 'jspeed' / 'targets' / 'cpu.json'}\n" in text
    assert re.search(r"^flops\.float32 +101\.2 GFLOP/s +measured by jspeed targets", text, re.M)
    assert "for a program's arrays in all, which the devices share." in text
    # Now it is one of them.
    assert re.search(
        r"^cpu .* 90 GFLOP/s +101\.2 GFLOP/s +40 GB/s +6 GB/s +- ", printed(capsys), re.M
    )
    assert list(json.loads(printed(capsys, as_json=True))) == [*TARGETS, "cpu"]


@pytest.mark.usefixtures("quick")
def test_measuring_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "mine.json"
    data = json.loads(printed(capsys, "cpu", measure=True, output=path, as_json=True))
    assert data == json.loads(path.read_text())
    assert data["host_link"]["bandwidth"]["value"] == 12e9
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "measures", "output", "text"),
    [
        (None, False, "x.json", '"--output": says where --measure writes. '),
        ("h200", True, None, "\"--measure\": measures this machine, 'cpu', not 'h200'. "),
        (None, True, "x.txt", '"--output": "x.txt" is no target file, which ends in .json.'),
    ],
)
def test_options_that_do_not_go_together(
    name: str | None, measures: bool, output: str | None, text: str
) -> None:
    path = Path(output) if output else None
    with pytest.raises(ConfigError) as caught:
        targets_command(name, as_json=False, measure=measures, output=path)
    assert str(caught.value).startswith(text)


def test_in_a_process_of_its_own() -> None:
    ran = jspeed("targets", "h20")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("jspeed: Target 'h20' is unknown. Did you mean 'h200'? Known: ")
    assert ran.err.count("\n") == 1
    ran = jspeed("targets", "h200")
    assert (ran.code, ran.err) == (0, "")


def test_the_documentation_shows_this_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = [line.rstrip() for line in printed(capsys).splitlines()[:6]]
    assert "\n".join(table) in PAGE.read_text(), "put the output of `jspeed targets` there"


def test_numbers() -> None:
    assert rate_text(989.4e12, "FLOP/s") == "989.4 TFLOP/s"
    assert rate_text(2.25e15, "FLOP/s") == "2.25 PFLOP/s"
    assert rate_text(12, "B/s") == "12 B/s"
    assert seconds_text(1.4e-5) == "14 us"

"""`jspeed schedule`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from jspeed.cli import console as consoles
from jspeed.cli.schedule import ScheduleRequest, schedule_command
from jspeed.core.errors import ConfigError
from jspeed.pipeline.schedules import KINDS, make_schedule
from tests.cli.processes import jspeed

ZB = ScheduleRequest("zb-h1", 4, 8, None, recompute=False, output=None, as_json=False)


def printed(capsys: pytest.CaptureFixture[str], request: ScheduleRequest) -> list[str]:
    schedule_command(request)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_table_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, ZB)
    assert lines[0] == "zb-h1: 4 stages, 8 microbatches"
    assert lines[2].split()[:4] == ["tick", "0", "1", "2"]
    # All ticks last equally long, so that is no row.
    assert lines[3].startswith("stage 0  F0 F1 F2 F3 .  .  .  B0 W0 F4 B1 W1 F5")
    assert lines[6].startswith("stage 3  .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 W0 F4")
    assert [re.sub(r"  +", ": ", line) for line in lines[-5:]] == [
        "ticks: 27",
        "time: 27 forwards of a whole stage, of which 24 are work",
        "bubble: 11.1%; the textbook's: 11.1%",
        "peak live: microbatches on each stage: 4 4 4 4",
        "sends: 24 activations and 24 gradients; at most 3 and 2 in a tick",
    ]


def test_chunks_are_letters_and_ticks_last_differently(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys, replace(ZB, kind="interleaved-1f1b", stages=2, microbatches=2))
    assert lines[3:6] == [
        "lasts    0.5 0.5 0.5 0.5 1   0.5 1   1   1   1",
        "stage 0  F0a F1a F0b F1b .   .   B0b B1b B0a B1a",
        "stage 1  .   F0a F1a F0b B0b F1b B1b B0a B1a .",
    ]
    assert lines[0] == "interleaved-1f1b: 2 stages, 2 microbatches, 2 chunks"
    assert "peak live  chunks of microbatches on each stage: 4 3" in lines


def test_more_chunks_than_letters(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(ZB, kind="forward", stages=1, microbatches=1, chunks=27))
    assert lines[3].split()[-1] == "F0.26"
    assert not any(line.startswith("peak live") for line in lines)


def test_recomputation(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(ZB, kind="1f1b", recompute=True))
    assert lines[3].split()[:7] == ["lasts", "1", "1", "1", "1", "3", "1"]
    assert lines[-4] == (
        "time       44 forwards of a whole stage, of which 32 are work, recomputation included"
    )


def test_a_narrow_terminal_has_blocks_and_leaves_out_the_middle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consoles, "make_console", lambda: Console(width=40))
    lines = printed(capsys, replace(ZB, stages=20, microbatches=40))
    assert all(len(line) <= 40 for line in lines)
    ticks = [line.split()[1:] for line in lines if line.startswith("tick  ")]
    # 40 - len("stage 19  ") leaves room for 7 cells of "F39 "; of 139 ticks both ends are there.
    assert [(row[0], row[-1]) for row in ticks] == [
        ("0", "6"), ("7", "13"), ("126", "132"), ("133", "138"),
    ]  # fmt: skip
    assert "... ticks 14 to 125: see --output" in "\n".join(lines)
    stages = [line.split()[1] for line in lines if line.startswith("stage")]
    assert stages[:16] == [*map(str, range(8)), *map(str, range(12, 20))]


def test_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(ZB, kind="all"))
    assert lines[0] == "4 stages, 8 microbatches"
    assert [line.split() for line in lines[3:7]] == [
        ["gpipe", "1", "22", "33", "27.3%", "27.3%", "8", "48"],
        ["1f1b", "1", "22", "33", "27.3%", "27.3%", "7", "48"],
        ["interleaved-1f1b", "2", "38", "28.5", "15.8%", "15.8%", "5.5", "112"],
        ["zb-h1", "1", "27", "27", "11.1%", "11.1%", "4", "48"],
    ]
    lines = printed(capsys, replace(ZB, kind="all", chunks=3))
    assert [line.split()[1] for line in lines[3:7]] == ["1", "1", "3", "1"]


def test_all_kinds_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(ZB, kind="all", microbatches=3))
    assert [line.split()[0] for line in lines[3:6]] == ["gpipe", "1f1b", "zb-h1"]
    assert lines[-1] == (
        'interleaved-1f1b: "--microbatches": 3 is fewer than "interleaved-1f1b" needs over 4 '
        'stages. Use 4 microbatches or more, at most 3 stages, or "--kind": "1f1b".'
    )


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads("\n".join(printed(capsys, replace(ZB, as_json=True, recompute=True))))
    assert data["table"] == make_schedule("zb-h1", stages=4, microbatches=8).table.tolist()
    assert data["operations"][data["table"][4][3][0]] == "backward_input"
    assert (data["kind"], data["ticks"], data["weighted_ticks"]) == ("zb-h1", 27, 49)
    assert data["costs"]["recompute"] == 1
    data = json.loads("\n".join(printed(capsys, replace(ZB, kind="all", as_json=True))))
    assert [one["kind"] for one in data["schedules"]] == list(KINDS)
    assert data["impossible"] == {}


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "new" / "zb.png"
    assert printed(capsys, replace(ZB, output=png))[-1] == f"Drawn to {png}"
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "1f1"},
            '"--kind": "1f1" is no schedule. Did you mean "1f1b"? Known: gpipe, 1f1b, '
            "interleaved-1f1b, zb-h1, forward, all.",
        ),
        (
            {"chunks": 2},
            '"--chunks": 2, but "zb-h1" has one chunk per stage. Use 1, or "--kind": '
            '"interleaved-1f1b".',
        ),
        ({"output": Path("a.pdf")}, '"--output": "a.pdf" is no picture; use NAME.png.'),
        (
            {"output": Path("/dev/null/a.png")},
            '"--output": "/dev/null/a.png" cannot be written ([Errno 17] File exists: '
            "'/dev/null').",
        ),
        (
            {"stages": 5000, "microbatches": 30},
            '"--microbatches": 30 over 5,000 stages are more than jspeed schedule shows. Use at '
            "most 100,000 for microbatches x stages x chunks.",
        ),
    ],
)
def test_wrong_requests(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        schedule_command(replace(ZB, **changes))
    assert str(raised.value) == message


def test_as_users_run_it() -> None:
    ran = jspeed("schedule", "--stages", "4", "--microbatches", "8", "--kind", "zb-h1")
    assert (ran.code, ran.err) == (0, "")
    assert "stage 0  F0 F1 F2 F3 .  .  .  B0 W0" in ran.out
    ran = jspeed("schedule", "--stages", "4", "--microbatches", "8", "--kind", "zbh1")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith('jspeed: "--kind": "zbh1" is no schedule. Did you mean "zb-h1"?')
    assert len(ran.err.splitlines()) == 1
    ran = jspeed("schedule", "--stages", "0", "--microbatches", "8")
    assert ran.code == 2
    assert "Traceback" not in ran.all

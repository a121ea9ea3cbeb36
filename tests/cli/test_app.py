from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest

import jspeed as package
from jspeed.cli.app import app
from jspeed.cli.failures import guarded
from tests.cli.processes import Ran, command, environment, jspeed, tiny_run, write


def test_version() -> None:
    ran = jspeed("--version")
    assert ran.code == 0
    assert re.fullmatch(
        rf"jspeed {re.escape(package.__version__)} \(JAX \d+\.\d+\.\d+, Python 3\.\d+\.\d+\)\n",
        ran.out,
    )


def in_this_process(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Ran:
    """For what ends before JAX would be imported."""
    monkeypatch.setattr("sys.argv", ["jspeed", *arguments])
    code = guarded(functools.partial(app, prog_name="jspeed"))
    return Ran(code, *capsys.readouterr())


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["train", "-h"], ["explain", "--help"]])
def test_help(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = in_this_process(arguments, monkeypatch, capsys)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Usage: jspeed ")
    # Nothing is cut off on 80 columns.
    assert "..." not in ran.out.replace("[ARGS]...", "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--nope"], "No such option: --nope"),
        (["trian"], "Did you mean 'train'?"),
        (["train"], "Missing argument 'RUN'"),
        (["config", "x.json", "--steps", "3"], "No such option: --steps"),
        (["explain", "x.json", "--devices", "0"], "Invalid value for '--devices'"),
        (["train", "x.json", "--steps", "many"], "Invalid value for '--steps'"),
        (["train", "x.json", "--set"], "'--set' requires an argument"),
    ],
)
def test_options_that_do_not_exist_or_fit(
    arguments: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = in_this_process(arguments, monkeypatch, capsys)
    assert (ran.code, ran.out) == (2, "")
    assert text in ran.err


@pytest.mark.parametrize("command", ["train", "config"])
def test_a_file_that_is_none(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "run.json", {})
    path = tmp_path / "runn.json"
    missing = in_this_process([command, str(path)], monkeypatch, capsys)
    assert (missing.code, missing.out) == (2, "")
    assert missing.err == f'jspeed: "{path}": no such file. Did you mean "run.json"?\n'
    folder = in_this_process([command, str(tmp_path)], monkeypatch, capsys)
    assert (folder.code, folder.out) == (2, "")
    assert folder.err == f'jspeed: "{tmp_path}": this is a folder, expected a JSON file.\n'


def test_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.json", tiny_run(tmp_path))
    arguments = ["config", path, "--set", "run.steps=7", "--set", "model.remat=full"]
    ran = in_this_process(arguments, monkeypatch, capsys)
    assert ran.code == 0
    assert re.search(r"^run\.steps +7 +override", ran.out, re.MULTILINE)
    assert re.search(r'^model\.remat +"full" +override', ran.out, re.MULTILINE)
    arguments = ["train", path, "--set", "run.steps"]
    without = in_this_process(arguments, monkeypatch, capsys)
    assert (without.code, without.out) == (2, "")
    assert without.err == 'jspeed: "run.steps": expected key=value, such as run.steps=10.\n'


@pytest.mark.parametrize("command", ["train", "explain"])
def test_a_file_without_a_model(command: str, tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", {"train_batch_size": 8, "optimizer": {"type": "AdamW"}})
    ran = jspeed(command, path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith('jspeed: "model": missing. ')
    assert ran.err.count("\n") == 1


def test_nobody_reads_the_output(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", tiny_run(tmp_path))
    for extra in ([], ["--json"]):
        process = subprocess.Popen(
            command("config", path, *extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == ""
        process.stderr.close()

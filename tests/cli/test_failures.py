from __future__ import annotations

from collections.abc import Callable

import pytest

from jspeed.cli.failures import guarded
from jspeed.core.errors import ConfigError, DataError, LayoutError, NotInJspeedError


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (LayoutError("no"), 2, "jspeed: no\n"),
        (NotInJspeedError("write\n  this"), 2, "jspeed: write\n  this\n"),
        (ConfigError('"a": one.'), 2, 'jspeed: "a": one.\n'),
        (
            ConfigError('"a": one.\n"b": two.'),
            2,
            'jspeed: 2 problems in the configuration:\n  "a": one.\n  "b": two.\n',
        ),
        (
            ZeroDivisionError("by zero"),
            1,
            "jspeed: unexpected ZeroDivisionError: by zero\nSet JSPEED_TRACEBACK=1 to see where, "
            "and please report it.\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(), 0, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(7), 7, ""),
        (SystemExit("text"), 1, ""),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raising(error)) == code
    assert capsys.readouterr().err == text


def test_success() -> None:
    assert guarded(lambda: None) == 0


@pytest.mark.parametrize("error", [DataError("gone"), RuntimeError("odd")])
def test_a_traceback_for_those_who_ask(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSPEED_TRACEBACK", "1")
    with pytest.raises(type(error)) as caught:
        guarded(raising(error))
    assert caught.value is error

"""Writes nested data as the text form of a protocol buffer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def text_proto(message: Mapping[str, Any]) -> str:
    """`{"a": {"b": 1}, "c": "x"}` -> `a {\\n  b: 1\\n}\\nc: "x"\\n`; numbers stay as they are."""
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for field, value in message.items():
        if isinstance(value, Mapping):
            yield f"{field} {{"
            yield from (f"  {line}" for line in _lines(value))
            yield "}"
        else:
            yield f"{field}: {json.dumps(value)}"

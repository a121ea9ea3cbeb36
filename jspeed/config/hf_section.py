"""`model: {"hf": DIR}` of a run file: the family and the sizes come from DIR/config.json."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jspeed.config.check import Entry
from jspeed.config.hf_model import CONFIG_NAME, model_keys, read_document
from jspeed.config.model_families import MODEL_FAMILIES
from jspeed.config.parse import Document, normalise
from jspeed.config.problem import Problem, config_error, shown
from jspeed.core.errors import ConfigError

SECTION, KEY = "model", "model.hf"
TOKENIZER = "tokenizer.json"


def complete(document: Document) -> tuple[Document, Mapping[str, str]]:
    """Return the document with what `model.hf` implies, and where each such key is from.

    A key that stands beside `hf` must say the same as config.json, if that has it; only
    `sequence_length` may be another where positions are rotations. Without a tokenizer of its own
    `data` gets the folder's.

    Raises:
        ConfigError: there is no such folder, or its model is not one that jspeed has.
    """
    section = document.tree.get(SECTION)
    folder = section.get("hf") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(folder, str) or not folder.strip():
        return document, {}
    path = Path(folder).expanduser()
    line = next(iter(document.lines.get(KEY, ())), None)
    try:
        found = model_keys(read_document(path), str(path / CONFIG_NAME))
    except ConfigError as error:
        # At once: the keys that config.json would have brought are not to be missed one by one.
        raise config_error(Problem(KEY, text, line) for text in str(error).splitlines()) from None
    keys, unfit = normalise(found)
    problems = [Problem(KEY, f"{path / CONFIG_NAME}: {problem}", line) for problem in unfit]
    problems += _contradictions(document, section, keys, path)
    tree = {**document.tree, SECTION: {**keys, **section}}
    origins = {f"{SECTION}.{name}": f"from {path / CONFIG_NAME}" for name in keys}
    data, tokenizer = tree.get("data"), path / TOKENIZER
    if isinstance(data, dict) and data.get("tokenizer") is None and tokenizer.is_file():
        tree["data"] = {**data, "tokenizer": {"kind": "file", "path": str(tokenizer)}}
        origins |= {f"data.tokenizer.{name}": f'from "{KEY}"' for name in ("kind", "path")}
    return replace(document, tree=tree, problems=(*document.problems, *problems)), origins


def noted(given: Mapping[str, Entry], origins: Mapping[str, str]) -> dict[str, Entry]:
    """Return `given` with a note on every value that `complete` brought."""

    def note(path: str) -> str:
        outer = path.rpartition(".")[0]
        return origins.get(path) or origins.get(outer, "")

    return {
        path: replace(entry, note=note(path)) if note(path) and entry.line is None else entry
        for path, entry in given.items()
    }


def _contradictions(
    document: Document, section: Mapping[str, Any], keys: Mapping[str, Any], path: Path
) -> list[Problem]:
    learned = MODEL_FAMILIES[keys["family"]].learned_positions
    free = () if learned else ("sequence_length",)
    return [
        Problem(
            f"{SECTION}.{name}",
            f"{shown(section[name])} contradicts {path / CONFIG_NAME}, which says {shown(value)}; "
            "leave it out.",
            next(iter(document.lines.get(f"{SECTION}.{name}", ())), None),
        )
        for name, value in keys.items()
        if name not in free and section.get(name) is not None and section[name] != value
    ]

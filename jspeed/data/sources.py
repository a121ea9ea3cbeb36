"""From the run file's `data.source` to files on disk."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from jspeed.core.errors import DataError
from jspeed.data.corpus import TextCorpus
from jspeed.data.python_docs import python_docs_file

SourceFormat = Literal["auto", "text", "jsonl", "tokens"]

# Names that mean a corpus of our own; a file or folder of that name is written "./golden".
BUILT_IN = ("python-docs", "golden")

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".bin": "tokens", ".npy": "tokens"}


@dataclass(frozen=True)
class TokenFiles:
    """Ready-made token files, read one behind the other.

    Attributes:
      name: what the run file calls them, for messages.
      root: the folder that file names are relative to.
      files: `.bin` (raw little-endian ids) or `.npy` files in order.
    """

    name: str
    root: Path
    files: tuple[Path, ...]


def resolve_source(
    source: str | Path, *, format: SourceFormat, text_key: str, cache_dir: Path
) -> TextCorpus | TokenFiles:
    """Returns the corpus that `source` names.

    Args:
      source: `"python-docs"`, `"golden"`, a file, or a folder, which is read recursively in the
        order of its sorted relative paths, without hidden files and folders.
      format: what the files hold. `"auto"` goes by their names: `.jsonl` and `.ndjson` are JSONL,
        `.bin` and `.npy` are tokens, everything else is text; a folder must then hold only one of
        them. With any other value a folder gives the files of that kind only.
      text_key: the key of the text in JSONL objects.
      cache_dir: where the text of `"python-docs"` is kept.

    Raises:
      DataError: if there is no such file or folder, or nothing in it to read.
    """
    name = str(source)
    if format not in get_args(SourceFormat):
        raise DataError(
            f'"data.format": {format!r:.40}. Expected one of {_quoted(get_args(SourceFormat))}.'
        )
    if name in BUILT_IN and format not in ("auto", "text"):
        raise DataError(
            f'"data.format": "{format}" does not fit the source "{name}", which is text. Leave it '
            f'out, or write "./{name}" for a file or folder of that name.'
        )
    if name == "python-docs":
        path = python_docs_file(cache_dir)
        # Its key is ours, whatever the key in the user's own files.
        return TextCorpus(name, path.parent, (path,), "jsonl", "text")
    if name == "golden":
        path = Path(str(resources.files("jspeed.data").joinpath("golden.txt")))
        return TextCorpus(name, path.parent, (path,), "text")
    root = Path(source).expanduser()
    if root.is_dir():
        files, kind = _folder_files(root, format)
    elif root.exists():
        files, kind = (root,), _kind_of(root) if format == "auto" else format
        root = root.parent
    else:
        raise DataError(
            f'"data.source": there is no file or folder "{name}" (looked for "{root.absolute()}"). '
            f"Expected a file, a folder, or one of {_quoted(BUILT_IN)}."
        )
    if kind == "tokens":
        return TokenFiles(name, root, files)
    return TextCorpus(name, root, files, "jsonl" if kind == "jsonl" else "text", text_key)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _kind_of(path: Path) -> str:
    return _SUFFIXES.get(path.suffix.lower(), "text")


def _folder_files(root: Path, format: SourceFormat) -> tuple[tuple[Path, ...], str]:
    """Returns the sorted files of a folder and their kind."""
    by_kind: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix()):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_file() and not hidden:
            by_kind.setdefault(_kind_of(path), []).append(path)
    counts = ", ".join(f"{len(files)} {kind}" for kind, files in sorted(by_kind.items()))
    if format == "auto" and len(by_kind) > 1:
        raise DataError(
            f'"data.source": the folder "{root}" mixes kinds of files ({counts}). '
            'Say which to read with "data.format": "text", "jsonl" or "tokens".'
        )
    kind = next(iter(by_kind), "text") if format == "auto" else format
    if not by_kind.get(kind):
        found = f"found only {counts} files" if counts else "it is empty"
        raise DataError(
            f'"data.source": the folder "{root}" has no {kind} files ({found}). '
            "Hidden files are not read."
        )
    return tuple(by_kind[kind]), kind

"""The default corpus: what the running Python says about itself, about 2 MB of English prose.

The sources of the standard library are parsed, never imported, so nothing in them runs.
"""

import ast
import json
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from jspeed.core.errors import DataError
from jspeed.data.cache import digest, publish

# Raised whenever the text made from the same sources changes.
_REVISION = "1"
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_BLOCKS = ("body", "orelse", "finalbody", "handlers")


def python_docs_file(cache_dir: Path, library: Path | None = None) -> Path:
    """Returns a JSONL file with one document per module and help topic of the running Python.

    The file is made once per Python version and cached. A document is an object with the key
    `text`: for a module, each documented name followed by its docstring, in the order of the
    source; for a help topic, its text. Modules come first; both are sorted by name.

    Args:
      cache_dir: the folder for the cached file.
      library: the folder of the standard library; that of the running Python if None.

    Raises:
      DataError: if the standard library has no sources to read.
    """
    root = Path(sysconfig.get_path("stdlib")) if library is None else library
    sources = _module_sources(root)
    if not sources:
        raise DataError(
            f'"data.source": "python-docs" reads the sources of the standard library, and "{root}" '
            'has none (a zipped or stripped Python). Use "golden", a text folder or a JSONL file.'
        )
    listing = (f"{name.as_posix()}:{(root / name).stat().st_size}" for name in sources)
    version = platform.python_version()
    key = digest([_REVISION, platform.python_implementation(), version, *listing])
    path = cache_dir / f"python-docs-{version}-{key}.jsonl"
    if path.is_file():
        return path

    def write(stream: BinaryIO) -> None:
        for text in _documents(root, sources):
            stream.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")

    return publish(path, write)


def _module_sources(root: Path) -> list[PurePath]:
    """Returns the sorted relative paths of the standard library's modules, without tests.

    Going by the names that Python itself lists leaves out site packages and build records.
    """
    found: list[PurePath] = []
    for entry in root.iterdir():
        if entry.name.removesuffix(".py") in sys.stdlib_module_names:
            paths = entry.rglob("*.py") if entry.is_dir() else [entry]
            found += [path.relative_to(root) for path in paths if path.suffix == ".py"]
    return sorted(path for path in found if _TEST_FOLDERS.isdisjoint(path.parts))


def _documents(root: Path, sources: list[PurePath]) -> Iterator[str]:
    topics: dict[str, str] = {}
    for source in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old modules with old escapes
                tree = ast.parse((root / source).read_bytes())
        except (SyntaxError, ValueError):
            continue  # data files of some tools end in .py and are not Python
        if source.as_posix() == "pydoc_data/topics.py":
            topics = _topics(tree)
            continue
        entries = list(_entries(tree, _module_name(source)))
        if entries:
            yield "\n\n\n".join(entries) + "\n"
    for name in sorted(topics):
        yield topics[name]


def _module_name(source: PurePath) -> str:
    parts = source.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _entries(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    """Yields name and docstring of `node` and of everything inside it, in source order."""
    text = ast.get_docstring(node)
    # Surrogates can be written in a literal but not in a file.
    if text and _is_unicode(text):
        yield f"{name}\n\n{text}"
    for inner in _definitions(node):
        yield from _entries(inner, f"{name}.{inner.name}")


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields the classes and functions directly inside `node`, also those under `if` and `try`."""
    for block in _BLOCKS:
        statements = getattr(node, block, ())
        for statement in statements if isinstance(statements, list) else ():
            if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield statement
            else:
                yield from _definitions(statement)


def _topics(tree: ast.Module) -> dict[str, str]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return ast.literal_eval(statement.value)
    return {}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

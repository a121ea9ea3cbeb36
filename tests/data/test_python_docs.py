import json
from pathlib import Path

import pytest

from jspeed.core.errors import DataError
from jspeed.data.python_docs import python_docs_file

SMALL_LIBRARY = {
    "json/__init__.py": '"""About json."""\nif True:\n    def load():\n        "Reads."\n',
    "json/tool.py": "raise SystemExit('never runs')\n",
    "json/tests/test_x.py": '"""A test."""',
    "glob.py": (
        'class A:\n    """Class A."""\n    def m(self):\n        """Line one.\n\n'
        '        Line two.\n        """\n    def bare(self): ...\ntry:\n    pass\n'
        'except OSError:\n    def late():\n        "In a handler."\n'
    ),
    "abc.py": "def broken(:\n",
    "site-packages/other.py": '"""Not ours."""',
    "sitecustomize.py": '"""Not ours either."""',
    "pydoc_data/topics.py": 'topics = {"while": "The while topic.", "if": "The if topic."}\n',
}


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    for name, text in SMALL_LIBRARY.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_modules_in_order_then_topics_and_nothing_is_run(library: Path, tmp_path: Path):
    path = python_docs_file(tmp_path / "cache", library)
    assert _texts(path) == [
        "glob.A\n\nClass A.\n\n\nglob.A.m\n\nLine one.\n\nLine two.\n\n\n"
        "glob.late\n\nIn a handler.\n",
        "json\n\nAbout json.\n\n\njson.load\n\nReads.\n",
        "The if topic.",
        "The while topic.",
    ]


def test_the_file_is_cached_until_the_library_changes(library: Path, tmp_path: Path):
    path = python_docs_file(tmp_path, library)
    path.write_text("kept")
    assert python_docs_file(tmp_path, library) == path
    assert path.read_text() == "kept"
    (library / "heapq.py").write_text('"""New."""')
    assert "heapq\n\nNew.\n" in _texts(python_docs_file(tmp_path, library))


def test_a_python_without_sources_is_told_what_to_use(tmp_path: Path):
    with pytest.raises(DataError) as error:
        python_docs_file(tmp_path, tmp_path)
    assert f'and "{tmp_path}" has none (a zipped or stripped Python). Use "golden"' in str(
        error.value
    )


def test_the_running_python_gives_two_megabytes_of_english(cache_dir: Path):
    texts = _texts(python_docs_file(cache_dir))
    assert 1_500_000 < sum(map(len, texts)) < 4_000_000
    assert len(texts) > 500
    assert any(text.startswith("json\n\nJSON (JavaScript Object Notation)") for text in texts)
    assert any('The "while" statement' in text for text in texts)
    assert not any(text.startswith("test.") for text in texts)

from pathlib import Path

import pytest

from jspeed.core.errors import DataError
from jspeed.data.corpus import TextCorpus
from jspeed.data.sources import SourceFormat, TokenFiles, resolve_source


def _resolve(source: str | Path, format: SourceFormat = "auto") -> TextCorpus | TokenFiles:
    return resolve_source(source, format=format, text_key="body", cache_dir=Path("unused"))


def _names(corpus: TextCorpus | TokenFiles) -> list[str]:
    return [path.relative_to(corpus.root).as_posix() for path in corpus.files]


def test_a_folder_is_read_recursively_in_sorted_order_without_hidden_files(text_folder: Path):
    corpus = _resolve(text_folder)
    assert isinstance(corpus, TextCorpus)
    assert corpus.kind == "text"
    assert _names(corpus) == ["a.txt", "b/c.txt", "b/d.txt", "e.txt"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", "text"), ("a.py", "text"), ("a.JSONL", "jsonl"), ("a.ndjson", "jsonl")],
)
def test_auto_goes_by_the_name(tmp_path: Path, name: str, kind: str):
    (tmp_path / name).write_text("x")
    for source in (tmp_path / name, tmp_path):
        corpus = _resolve(source)
        assert isinstance(corpus, TextCorpus)
        assert (corpus.kind, corpus.text_key, _names(corpus)) == (kind, "body", [name])


@pytest.mark.parametrize("name", ["t.bin", "t.npy"])
def test_auto_knows_token_files(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"12")
    assert _resolve(tmp_path / name) == TokenFiles(
        str(tmp_path / name), tmp_path, (tmp_path / name,)
    )


def test_a_format_wins_over_the_name_and_selects_in_a_folder(tmp_path: Path):
    for name in ("a.txt", "b.jsonl", "c.bin"):
        (tmp_path / name).write_text("x")
    corpus = _resolve(tmp_path / "b.jsonl", "text")
    assert isinstance(corpus, TextCorpus)
    assert corpus.kind == "text"
    assert _names(_resolve(tmp_path, "jsonl")) == ["b.jsonl"]
    assert _names(_resolve(tmp_path, "tokens")) == ["c.bin"]
    with pytest.raises(DataError, match=r"mixes kinds of files \(1 jsonl, 1 text, 1 tokens\)"):
        _resolve(tmp_path)


def test_a_missing_source_is_named():
    with pytest.raises(DataError) as error:
        _resolve("no/such")
    assert str(error.value).startswith('"data.source": there is no file or folder "no/such" (look')
    assert str(error.value).endswith('a file, a folder, or one of "python-docs", "golden".')


def test_an_empty_folder_and_one_without_the_format(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no text files \(it is empty\)"):
        _resolve(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"has no jsonl files \(found only 1 text files\)"):
        _resolve(tmp_path, "jsonl")


def test_formats_that_cannot_be():
    with pytest.raises(DataError, match=r'"data.format": \'csv\'. Expected one of "auto", "text"'):
        _resolve("golden", "csv")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r'"tokens" does not fit the source "golden".*"./golden"'):
        _resolve("golden", "tokens")


def test_golden_is_ascii_prose_of_ours():
    corpus = _resolve("golden")
    assert isinstance(corpus, TextCorpus)
    (piece,) = corpus.pieces()
    assert piece.text.isascii()
    assert 20_000 < len(piece.text) < 30_000
    # The committed curves are of exactly this text.
    assert corpus.key() == "d3349aaf19d7f0975a7a7017"

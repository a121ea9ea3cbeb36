from pathlib import Path

import pytest

from jspeed.core.errors import DataError
from jspeed.data import corpus as corpus_module
from jspeed.data.corpus import Piece, TextCorpus


def _corpus(path: Path, kind: str = "text", **options: str) -> TextCorpus:
    return TextCorpus("name", path.parent, (path,), kind, **options)  # type: ignore[arg-type]


def test_long_files_come_in_pieces_that_join_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 16)
    text = "a line of ä\r\n" * 9 + "x" * 70 + "\nend"
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    pieces = list(_corpus(path).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 5
    assert [piece.opens_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert pieces[0].text == "a line of ä\r\na line of ä\r\n"  # cut behind a newline


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert list(_corpus(tmp_path / "a.txt").pieces()) == [Piece("hello", True)]


def test_jsonl_lines_are_documents_and_empty_ones_are_left_out(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one\\n"}\n\n{"body": ""}\n  {"body": "two", "text": 3}\n')
    pieces = list(_corpus(path, "jsonl", text_key="body").pieces())
    assert pieces == [Piece("one\n", True), Piece("two", True)]


def test_the_key_follows_the_content_and_not_the_place(tmp_path: Path):
    keys = []
    for folder, text in [("a", "x"), ("b", "x"), ("c", "y")]:
        path = tmp_path / folder / "t.txt"
        path.parent.mkdir()
        path.write_text(text)
        keys.append(_corpus(path).key())
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": ', "not valid JSON (Expecting value"),
        (b'["text"]', 'a JSON list. Expected an object with "text" in it.'),
        (b'{"body": "x", "id": 1}', 'no key "text", found "body", "id". Name the key'),
        (b"{}", 'no key "text", found no keys'),
        (b'{"text": 12}', '"text" is 12. Expected a string'),
        (b'{"text": "a\\ud800"}', '"text" has half of a surrogate pair at character 1'),
        (b'{"text": "\xff"}', "not UTF-8 (invalid start byte at byte 10)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, expected: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        list(_corpus(path, "jsonl").pieces())
    assert str(error.value).startswith(f'"{path}", line 3: {expected}')


def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"fine\n" * 5000 + b"\xfe\xff\n" + b"fine\n" * 5)
    with pytest.raises(DataError) as error:
        list(_corpus(path).pieces())
    assert str(error.value).startswith(f'"{path}", line 5001: not UTF-8 text (invalid start byte)')


def test_a_file_that_vanished_is_named(tmp_path: Path):
    for read in (TextCorpus.key, lambda corpus: list(corpus.pieces())):
        with pytest.raises(DataError, match=r'gone.txt": cannot be read \(No such file'):
            read(_corpus(tmp_path / "gone.txt"))

from pathlib import Path

import numpy as np
import pytest

from jspeed.core.errors import DataError
from jspeed.data import ByteTokenizer
from jspeed.data import tokens as tokens_module
from jspeed.data.sources import resolve_source
from jspeed.data.tokens import check_dtype, open_token_files, tokenize_corpus

from .conftest import DOCUMENTS


def test_a_folder_becomes_documents_behind_separators(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens_module, "_BATCH_CHARACTERS", 50)  # several batches
    corpus = resolve_source(text_folder, format="auto", text_key="", cache_dir=tmp_path)
    stream = tokenize_corpus(
        corpus, ByteTokenizer(), corpus_key="k", dtype="uint16", cache_dir=tmp_path
    )
    expected = [i for text in DOCUMENTS.values() if text for i in (256, *text.encode())]
    assert stream.read(0, len(stream)).tolist() == expected
    again = tokenize_corpus(
        corpus, ByteTokenizer(), corpus_key="k", dtype="uint32", cache_dir=tmp_path
    )
    assert again.read(0, len(again)).tolist() == expected
    assert again.fingerprint == stream.fingerprint  # the same ids, however wide on disk
    sizes = {path.name.split(".")[-2]: path.stat().st_size for path in tmp_path.glob("*.bin")}
    assert sizes == {"uint16": 2 * len(expected), "uint32": 4 * len(expected)}


def test_the_cache_is_used(text_folder: Path, tmp_path: Path):
    corpus = resolve_source(text_folder, format="auto", text_key="", cache_dir=tmp_path)
    arguments = {"corpus_key": "k", "dtype": "uint16", "cache_dir": tmp_path}
    first = tokenize_corpus(corpus, ByteTokenizer(), **arguments)
    (text_folder / "a.txt").unlink()  # would be noticed if the text were read again
    assert len(tokenize_corpus(corpus, ByteTokenizer(), **arguments)) == len(first)


def test_several_files_are_one_stream(tmp_path: Path):
    np.arange(0, 10, dtype="<u4").tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", np.arange(10, 13, dtype=np.int64))
    (tmp_path / "c.bin").write_bytes(b"")
    np.arange(13, 20, dtype="<u4").tofile(tmp_path / "d.bin")
    files = [tmp_path / name for name in ("a.bin", "b.npy", "c.bin", "d.bin")]
    stream = open_token_files(files, dtype="uint32", vocab_size=20)
    assert len(stream) == 20
    for start in range(20):
        for stop in range(start + 1, 21):
            ids = stream.read(start, stop)
            assert ids.dtype == np.int32
            assert ids.tolist() == list(range(start, stop))


def test_files_are_mapped_and_not_read(tmp_path: Path):
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte: reading it whole would fail
    stream = open_token_files([path], dtype="uint16", vocab_size=10)
    assert len(stream) == 1 << 39
    assert stream.read(1 << 38, (1 << 38) + 3).tolist() == [0, 0, 0]


def test_the_fingerprint_follows_the_content(tmp_path: Path):
    path = tmp_path / "a.bin"
    seen = set()
    for ids in (range(9), range(1, 10), range(8)):
        np.array(ids, dtype="<u2").tofile(path)
        seen.add(open_token_files([path], dtype="uint16", vocab_size=20).fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([1, 2, 12, 3], "position 2 is 12"), ([1, 2, 3, -1], "position 3 is -1")],
)
def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, ids: list[int], expected: str):
    np.save(tmp_path / "a.npy", np.zeros(5, np.int32))
    np.save(tmp_path / "b.npy", np.array(ids, np.int32))
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    stream = open_token_files(files, dtype="uint16", vocab_size=12)
    assert stream.read(0, 7).tolist() == [0, 0, 0, 0, 0, 1, 2]
    with pytest.raises(DataError) as error:
        stream.read(4, 9)
    assert f'"{files[1]}": the token at {expected}, and the vocabulary has 12 ids (0 to 11)' in str(
        error.value
    )


def test_files_that_are_no_tokens(tmp_path: Path):
    def error(name: str, dtype: str = "uint16") -> str:
        with pytest.raises(DataError) as caught:
            open_token_files([tmp_path / name], dtype=dtype, vocab_size=10)  # type: ignore
        return str(caught.value).removeprefix(f'"{tmp_path / name}": ')

    (tmp_path / "odd.bin").write_bytes(b"123456")
    assert error("odd.bin", "uint32").startswith(
        "6 bytes are not a whole number of uint32 ids of 4"
    )
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.int32))
    assert error("square.npy") == "holds int32 of shape (2, 2). Expected a list of integers."
    np.save(tmp_path / "float.npy", np.zeros(2))
    assert error("float.npy") == "holds float64 of shape (2,). Expected a list of integers."
    (tmp_path / "text.npy").write_text("hello")
    assert error("text.npy").startswith("cannot be read as token ids (")
    assert error("missing.bin").startswith("cannot be read as token ids ([Errno 2]")


def test_a_vocabulary_must_fit_its_type():
    check_dtype(65536, "uint16")
    check_dtype(65537, "uint32")
    with pytest.raises(DataError, match=r"uint16 holds ids up to 65535.* 65537 ids.*\"uint32\""):
        check_dtype(65537, "uint16")
    with pytest.raises(DataError, match=r"'int8'. Expected \"uint16\" or \"uint32\""):
        check_dtype(5, "int8")  # type: ignore[arg-type]

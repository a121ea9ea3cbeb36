import json
from pathlib import Path

import numpy as np
import pytest

from jspeed.core.errors import DataError
from jspeed.data import TextDataset, Tokenizer, build_dataset

from .conftest import DOCUMENTS


def _golden(cache_dir: Path, **options: object) -> TextDataset:
    arguments: dict = {"source": "golden", "vocab_size": 600, "sequence_length": 32}
    return build_dataset(cache_dir=cache_dir, **(arguments | options))


def _batches(dataset: TextDataset, steps: int = 5) -> np.ndarray:
    iterator = dataset.train_iterator(6)
    return np.stack([next(iterator)["input_ids"] for _ in range(steps)])


def test_two_builds_are_equal_with_and_without_a_cache(tmp_path: Path):
    fresh, cached = _golden(tmp_path / "a"), _golden(tmp_path / "a")
    other = _golden(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert [name.split("-")[0] for name in files] == ["tokenizer", "tokens"]
    for dataset in (cached, other):
        assert dataset.tokenizer.to_json() == fresh.tokenizer.to_json()
        assert np.array_equal(_batches(dataset), _batches(fresh))


def test_the_golden_text_is_learned_from(cache_dir: Path):
    dataset = _golden(cache_dir)
    assert dataset.tokenizer.vocab_size == 600
    assert 6_000 < dataset.tokens < 9_000
    text = dataset.tokenizer.decode(_batches(dataset, 1)[0, 0])
    golden = Path(__file__).parents[2] / "jspeed" / "data" / "golden.txt"
    assert text in golden.read_text()
    assert len(text) > 60


def test_a_saved_tokenizer_gives_the_same_data(tmp_path: Path, cache_dir: Path):
    """What a checkpoint does: the position stays valid under the tokenizer saved with it."""
    trained = _golden(cache_dir)
    iterator = trained.train_iterator(4)
    next(iterator)
    path = tmp_path / "tokenizer.json"
    trained.tokenizer.save(path)
    loaded = _golden(tmp_path, tokenizer_kind="file", tokenizer_path=path)
    resumed = loaded.train_iterator(4)
    resumed.restore(iterator.state())
    assert np.array_equal(next(resumed)["labels"], next(iterator)["labels"])


def test_another_tokenizer_is_other_data(cache_dir: Path):
    iterator = _golden(cache_dir, tokenizer_kind="byte").train_iterator(4)
    with pytest.raises(DataError, match="fingerprint was "):
        iterator.restore(_golden(cache_dir).train_iterator(4).state())


def test_python_docs_is_the_default(cache_dir: Path):
    dataset = build_dataset(tokenizer_kind="byte", cache_dir=cache_dir)
    assert dataset.sequence_length == 256
    assert dataset.split.held_out == round(dataset.split.total * 0.05)
    # A byte or the separator each; all documents, their separators, and nothing else.
    (text,) = cache_dir.glob("python-docs-*.jsonl")
    documents = [json.loads(line)["text"] for line in text.read_text("utf-8").splitlines()]
    assert dataset.tokens == sum(len(document.encode()) + 1 for document in documents)


def test_texts_and_jsonl_give_the_same_tokens(text_folder: Path, tmp_path: Path):
    lines = [json.dumps({"body": text}) for text in DOCUMENTS.values()]
    (tmp_path / "same.jsonl").write_text("\n".join(lines))
    options: dict = {
        "tokenizer_kind": "byte",
        "sequence_length": 16,
        "shuffle": False,
        "cache_dir": tmp_path / "cache",
    }
    one = build_dataset(source=text_folder, **options)
    other = build_dataset(source=tmp_path / "same.jsonl", text_key="body", **options)
    assert one.tokens == other.tokens == sum(len(t.encode()) + 1 for t in DOCUMENTS.values() if t)
    assert np.array_equal(_batches(one), _batches(other))


def test_token_files_with_and_without_their_tokenizer(tmp_path: Path, cache_dir: Path):
    tokenizer = _golden(cache_dir).tokenizer
    ids = [0, *tokenizer.encode("A word and another word. " * 8)]
    np.save(tmp_path / "t.npy", np.array(ids, np.int64))
    tokenizer.save(tmp_path / "tokenizer.json")
    options: dict = {"source": tmp_path / "t.npy", "sequence_length": 8, "cache_dir": tmp_path}
    named = build_dataset(
        tokenizer_kind="file", tokenizer_path=tmp_path / "tokenizer.json", **options
    )
    window = next(named.train_iterator(1))["input_ids"][0]
    assert named.tokenizer.decode(window) in "<|endoftext|>" + "A word and another word. " * 8
    unnamed = build_dataset(vocab_size=600, **options)
    assert unnamed.tokenizer.vocab_size == 600
    assert np.array_equal(next(unnamed.train_iterator(1))["input_ids"][0], window)
    unnamed.tokenizer.save(tmp_path / "ids.json")
    assert Tokenizer.load(tmp_path / "ids.json").vocab_size == 600


def test_errors_of_the_arguments(tmp_path: Path, cache_dir: Path):
    def error(**options: object) -> str:
        with pytest.raises(DataError) as caught:
            _golden(cache_dir, **options)
        return str(caught.value)

    (tmp_path / "empty.txt").write_text("")
    assert f'"{tmp_path}/empty.txt" is empty: there is no text' in error(
        source=tmp_path / "empty.txt"
    )
    (tmp_path / "short.txt").write_text("ten bytes.")
    assert 'short.txt" has 11 tokens, and one sequence takes 33' in error(
        source=tmp_path / "short.txt", tokenizer_kind="byte"
    )
    assert "there is no file or folder" in error(source=tmp_path / "missing")
    assert "uint16 holds ids up to 65535, and the vocabulary has 70000 ids" in error(
        vocab_size=70000
    )
    assert '\'word\'. Expected "bpe", "byte" or "file".' in error(tokenizer_kind="word")
    assert error(tokenizer_kind="file").startswith('"data.tokenizer.path": missing.')
    assert 'vocab_size": 100 is too small' in error(vocab_size=100)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r'file/tokens-.*": cannot be written \(.*name a folder'):
        _golden(tmp_path / "file", tokenizer_kind="byte")

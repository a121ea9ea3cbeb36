import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.core.errors import DataError, MissingExtraError
from jspeed.data import ByteTokenizer, Tokenizer
from jspeed.data.bpe import BpeTokenizer, train_bpe
from jspeed.data.tokenizer import IdTokenizer

TEXTS = ["the cat and the other cat sat on the mat\n" * 20, "a hat, a bat and a mat: that is that"]


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return train_bpe(iter(TEXTS), vocab_size=270)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80))
def test_every_text_survives_the_round_trip(bpe: BpeTokenizer, text: str):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_training_is_deterministic_and_shortens_the_text(bpe: BpeTokenizer):
    assert train_bpe(iter(TEXTS), vocab_size=270).to_json() == bpe.to_json()
    assert bpe.vocab_size == 270
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_a_small_corpus_gives_a_smaller_vocabulary():
    tokenizer = train_bpe(iter(["aaaa aaaa"]), vocab_size=5000)
    assert 257 < tokenizer.vocab_size < 270


def test_encode_batch_equals_encode(bpe: BpeTokenizer):
    for tokenizer in (bpe, ByteTokenizer()):
        assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_separators(bpe: BpeTokenizer):
    assert bpe.separator_id == 0
    assert bpe.encode("x<|endoftext|>y") == [*bpe.encode("x"), 0, *bpe.encode("y")]
    assert bpe.decode([0]) == "<|endoftext|>"
    assert ByteTokenizer().separator_id == 256
    assert ByteTokenizer().decode([104, 256, 105]) == "hi"


def test_a_cut_character_becomes_a_replacement():
    ids = ByteTokenizer().encode("ä")
    assert ids == [0xC3, 0xA4]
    assert ByteTokenizer().decode(ids[:1]) == "\ufffd"


def test_save_and_load(bpe: BpeTokenizer, tmp_path: Path):
    for tokenizer in (bpe, ByteTokenizer(), IdTokenizer(77)):
        path = tmp_path / "deep" / "tokenizer.json"
        tokenizer.save(path)
        loaded = Tokenizer.load(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.separator_id == tokenizer.separator_id
        assert loaded.fingerprint == tokenizer.fingerprint
    assert bpe.fingerprint != ByteTokenizer().fingerprint
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]  # no temporary file stays


def test_limits_saved_in_a_foreign_file_do_not_cut_text(bpe: BpeTokenizer):
    content = json.loads(bpe.to_json())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    loaded = BpeTokenizer.from_json(json.dumps(content), origin="x.json")
    assert loaded.encode(TEXTS[1]) == bpe.encode(TEXTS[1])
    assert len(loaded.encode(TEXTS[1])) > 3


def test_the_known_separators_of_foreign_files_are_found(bpe: BpeTokenizer):
    text = bpe.to_json().replace("<|endoftext|>", "</s>")
    assert BpeTokenizer.from_json(text, origin="x.json").separator_id == 0
    with pytest.raises(DataError) as error:
        BpeTokenizer.from_json(bpe.to_json().replace("<|endoftext|>", "<odd>"), origin="x.json")
    assert '"x.json" has no token that separates documents' in str(error.value)
    assert "</s>" in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "holds a JSON list"),
        (b"{}", "is not a usable tokenizer.json"),
        (b'{"jspeed_tokenizer": "new"}', "names the tokenizer kind 'new'"),
        (b'{"jspeed_tokenizer": "ids"}', "names the tokenizer kind 'ids'"),
    ],
)
def test_load_says_what_is_wrong_with_a_file(tmp_path: Path, content: bytes | None, expected: str):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        Tokenizer.load(path)
    assert str(error.value).startswith('"data.tokenizer.path": ')
    assert f'"{path}"' in str(error.value)
    assert expected in str(error.value)


def test_ids_outside_the_vocabulary_are_named(bpe: BpeTokenizer):
    for tokenizer in (bpe, ByteTokenizer()):
        size = tokenizer.vocab_size
        with pytest.raises(
            DataError, match=f"token id {size}: the vocabulary has {size} ids, 0 to"
        ):
            tokenizer.decode([1, size])


def test_unknown_tokenizers_say_how_to_name_one():
    for call in (lambda t: t.encode("x"), lambda t: t.decode([1])):
        with pytest.raises(DataError, match=r"\(77\) is known.*\"kind\": \"file\""):
            call(IdTokenizer(77))


def test_too_small_a_vocabulary():
    with pytest.raises(DataError, match=r"vocab_size\": 256 is too small.*at least 257"):
        train_bpe(iter(TEXTS), vocab_size=256)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r'"tokenizers".*pip install "jspeed\[data\]"'):
        train_bpe(iter(TEXTS), vocab_size=270)

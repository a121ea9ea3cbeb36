"""Masked tokens: how many, what stands in their place, and that a run can be resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jspeed.data import build_dataset
from jspeed.data.bpe import BpeTokenizer
from jspeed.data.masking import Masking

VOCAB, ROWS, LENGTH = 1000, 200, 128


def masked(masking: Masking, start: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    tokens = np.random.default_rng(0).integers(1, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    batch = {"input_ids": tokens.copy(), "labels": tokens.copy(), "positions": tokens}
    return tokens, masking.apply(batch, range(start, start + ROWS))


def test_of_the_tokens_15_percent_are_told_and_of_these_80_are_masked_and_10_random():
    tokens, batch = masked(Masking(VOCAB, seed=0))
    inputs, chosen = batch["input_ids"], batch["labels"] != -100
    count = chosen.sum()
    # Four standard deviations of so many throws.
    assert abs(count / chosen.size - 0.15) < 4 * np.sqrt(0.15 * 0.85 / chosen.size)
    np.testing.assert_array_equal(batch["labels"][chosen], tokens[chosen])
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    shares = {
        0.8: inputs[chosen] == VOCAB,
        0.1: (inputs[chosen] != VOCAB) & (inputs[chosen] != tokens[chosen]),
    }
    for share, those in shares.items():
        assert abs(those.mean() - share) < 4 * np.sqrt(share * (1 - share) / count) + 1 / VOCAB
    assert batch["positions"] is not None
    assert inputs.dtype == batch["labels"].dtype == np.int32
    assert 0 <= inputs.min() <= inputs.max() == VOCAB


def test_the_choice_is_the_sequences_own():
    _, first = masked(Masking(VOCAB, seed=0))
    _, again = masked(Masking(VOCAB, seed=0))
    np.testing.assert_array_equal(first["labels"], again["labels"])
    for other in (masked(Masking(VOCAB, seed=1)), masked(Masking(VOCAB, seed=0), start=ROWS)):
        assert ((first["labels"] != -100) != (other[1]["labels"] != -100)).any(axis=1).all()


def test_separators_are_never_told_and_every_other_sequence_has_something_to_tell():
    masking = Masking(VOCAB, seed=0, separator_id=7)
    tokens = np.full((300, 4), 7, np.int32)
    tokens[1:, 2] = 5
    batch = masking.apply({"input_ids": tokens, "labels": tokens}, range(300))
    told = batch["labels"] != -100
    assert not told[0].any()
    assert (told[1:] == [False, False, True, False]).all()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_has_the_same_masks(tmp_path: Path, processes: int):
    dataset = build_dataset(
        source="golden", tokenizer_kind="byte", sequence_length=64, masked=True, cache_dir=tmp_path
    )
    assert dataset.vocab_size == 258
    through = dataset.train_iterator(4)
    expected = [next(through) for _ in range(3)]
    assert any((batch["input_ids"] == 257).any() for batch in expected)
    parts = [dataset.train_iterator(4 // processes, p, processes) for p in range(processes)]
    for part in parts:
        next(part)
        state = part.state()
        next(part)
        part.restore(state)
    got = [next(part) for part in parts]
    for name, value in expected[1].items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in got]), value)
    for iterator in (through, *parts):
        iterator.close()
    first, second = (next(iter(dataset.validation_batches(4))) for _ in range(2))
    np.testing.assert_array_equal(first["labels"], second["labels"])


def test_the_mask_of_a_tokenizer():
    """A file that has a mask of its own, as BERT's, has it used, and no id is added for it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[MASK]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3, "b": 4}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = BpeTokenizer.from_json(inner.to_str(), origin="test")
    assert (tokenizer.mask_id, tokenizer.separator_id) == (0, 1)
    _, batch = masked(Masking(VOCAB, seed=0, own_mask=0))
    told = batch["labels"] != -100
    assert (batch["input_ids"][told] == 0).mean() > 0.7
    assert (batch["input_ids"] < VOCAB).all()

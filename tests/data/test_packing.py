import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.core.errors import DataError
from jspeed.data.packing import PackedSequences, Split, make_batch
from jspeed.data.tokens import TokenStream


def _packed(tokens: int, length: int) -> PackedSequences:
    ids = np.arange(tokens, dtype=np.uint16)
    stream = TokenStream([("a.bin", ids)], vocab_size=tokens, fingerprint="f")  # type: ignore
    return PackedSequences(stream, sequence_length=length, name="mine")


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 9), tokens=st.integers(10, 60))
def test_the_windows_reproduce_the_stream(length: int, tokens: int):
    packed = _packed(tokens, length)
    windows = np.stack([packed[i] for i in range(len(packed))])
    batch = make_batch(windows, separator_id=None)
    assert sorted(batch) == ["input_ids", "labels"]
    kept = len(packed) * length
    assert batch["input_ids"].ravel().tolist() == list(range(kept))
    # Every token but the first is a label once; less than a sequence is left out.
    assert batch["labels"].ravel().tolist() == list(range(1, kept + 1))
    assert 0 <= tokens - 1 - kept < length
    assert batch["input_ids"].dtype == batch["labels"].dtype == np.int32


def test_a_stream_that_is_too_short():
    assert len(_packed(5, 4)) == 1
    with pytest.raises(DataError) as error:
        _packed(4, 4)
    assert '"mine" has 4 tokens, and one sequence takes 5 ("data.sequence_length" 4' in str(
        error.value
    )
    with pytest.raises(DataError, match='the corpus "mine" is empty'):
        _packed(0, 4)
    with pytest.raises(DataError, match=r'"data.sequence_length": 0. Expected at least 1.'):
        _packed(9, 0)


@settings(max_examples=200, deadline=None)
@given(total=st.integers(2, 300), fraction=st.floats(0, 1, exclude_max=True))
def test_the_parts_of_a_split_are_disjoint_and_complete(total: int, fraction: float):
    split = Split.of(total, fraction)
    training = [split.training_index(i) for i in range(split.training)]
    validation = [split.validation_index(i) for i in range(split.held_out)]
    assert sorted(training + validation) == list(range(total))
    assert training == sorted(training)
    assert len(validation) == pytest.approx(total * fraction, abs=1)


def test_validation_is_spread_evenly():
    split = Split.of(100, 0.05)
    assert [split.validation_index(i) for i in range(split.held_out)] == [10, 30, 50, 70, 90]
    assert Split.of(100, 0.001).held_out == 1
    assert Split.of(100, 0).held_out == 0


def test_impossible_splits():
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match=rf'fraction": {fraction}. Expected at least 0 an'):
            Split.of(10, fraction)
    with pytest.raises(DataError, match=r"0.1 of 1 sequence leaves none to train on"):
        Split.of(1, 0.1)
    assert Split.of(1, 0).training == 1


def test_a_document_mask_counts_documents_and_restarts_positions():
    # Separator 9. Row 0 begins inside a document, row 1 with a separator.
    windows = np.array([[1, 2, 9, 3, 4, 9, 5], [9, 1, 9, 9, 2, 3, 9]], dtype=np.int32)
    batch = make_batch(windows, separator_id=9)
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 2, 3], [1, 1, 2, 3, 3, 3]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 0, 1, 2]]
    assert batch["segment_ids"].dtype == batch["positions"].dtype == np.int32
    assert batch["labels"].tolist() == windows[:, 1:].tolist()


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=4))
def test_positions_are_the_place_within_the_segment(rows: list[list[int]]):
    batch = make_batch(np.array(rows, dtype=np.int32), separator_id=0)
    for ids, segments, positions in zip(
        batch["input_ids"], batch["segment_ids"], batch["positions"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            assert not (ids[inside][1:] == 0).any()  # a separator only opens a segment


def test_the_arrays_of_a_batch_are_independent():
    batch = make_batch(np.array([[1, 2, 3]], dtype=np.int32), separator_id=None)
    batch["labels"][:] = -100
    assert batch["input_ids"].tolist() == [[1, 2]]

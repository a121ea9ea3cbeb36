import itertools
import json
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.core.errors import DataError, MissingExtraError
from jspeed.data import TextDataset

Make = Callable[..., TextDataset]

# 23 windows of 4 tokens; without validation all 23 are for training.
TOKENS = 4 * 23 + 1


def _sequences(dataset: TextDataset, steps: int, batch: int, processes: int = 1, state=None):
    """Returns the numbers of the windows in each global batch, in order."""
    iterators = [dataset.train_iterator(batch, p, processes) for p in range(processes)]
    for iterator in iterators if state else ():
        iterator.restore(state)
    found = []
    for _ in range(steps):
        parts = [next(iterator)["input_ids"][:, 0] // 4 for iterator in iterators]
        found.append(np.concatenate(parts).tolist())
    for iterator in iterators:
        iterator.close()
    return found, iterators[0].state()


def test_each_epoch_takes_every_sequence_once_in_another_order(counting: Make):
    dataset = counting(TOKENS, validation_fraction=0)
    batches, _ = _sequences(dataset, 23, batch=2)
    flat = list(itertools.chain(*batches))
    first, second = flat[:23], flat[23:]
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second
    assert first != list(range(23))


def test_without_shuffling_the_order_is_that_of_the_corpus(counting: Make):
    dataset = counting(TOKENS, validation_fraction=0, shuffle=False)
    batches, state = _sequences(dataset, 3, batch=10)
    assert batches == [list(range(10)), list(range(10, 20)), [20, 21, 22, *range(7)]]
    # No seed is in such an order, so a position holds for any.
    other = counting(TOKENS, validation_fraction=0, shuffle=False, seed=3).train_iterator(5)
    other.restore(state)
    assert other.state() == state


def test_the_order_is_pinned(counting: Make):
    # A checkpoint's position means these sequences; a Grain with another shuffle must be noticed.
    batches, _ = _sequences(counting(TOKENS, validation_fraction=0), 3, batch=4)
    assert batches == [[13, 8, 22, 16], [1, 4, 9, 0], [18, 12, 3, 21]]


def test_seeds_differ_and_do_not_share_epochs(counting: Make):
    def epochs(seed: int) -> list[list[int]]:
        return _sequences(counting(TOKENS, validation_fraction=0, seed=seed), 3, batch=23)[0]

    orders = [epoch for seed in (0, 1, 2, 2**70) for epoch in epochs(seed)]
    assert len({tuple(order) for order in orders}) == 12
    assert epochs(2) == orders[6:9]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(
    counting: Make, processes: int
):
    dataset = counting(TOKENS)
    alone, _ = _sequences(dataset, 8, batch=12)
    shared, _ = _sequences(dataset, 8, batch=12 // processes, processes=processes)
    assert shared == alone


@pytest.fixture(scope="module")
def reference(counting: Make) -> list[int]:
    """The sequences of the first ten epochs, read in one go."""
    batches, _ = _sequences(counting(TOKENS, validation_fraction=0), 10, batch=23)
    return list(itertools.chain(*batches))


@settings(max_examples=25, deadline=None)
@given(
    before=st.integers(0, 7),
    batch_before=st.integers(1, 5),
    processes_before=st.integers(1, 3),
    batch=st.integers(1, 5),
    processes=st.integers(1, 3),
)
def test_resuming_continues_with_the_next_sequence(
    counting: Make,
    reference: list[int],
    before: int,
    batch_before: int,
    processes_before: int,
    batch: int,
    processes: int,
):
    """Anywhere, also across epochs, with another batch size and other processes."""
    dataset = counting(TOKENS, validation_fraction=0)
    first, state = _sequences(dataset, before, batch_before, processes_before)
    consumed = before * batch_before * processes_before
    assert state["sequences_consumed"] == consumed
    assert list(itertools.chain(*first)) == reference[:consumed]
    state = json.loads(json.dumps(state))
    # A second build stands for the process that resumes.
    rebuilt = counting(TOKENS, validation_fraction=0)
    second, after = _sequences(rebuilt, 3, batch, processes, state=state)
    stop = consumed + 3 * batch * processes
    assert list(itertools.chain(*second)) == reference[consumed:stop]
    assert after["sequences_consumed"] == stop


def test_a_running_iterator_can_be_set_back(counting: Make):
    iterator = counting(TOKENS).train_iterator(4)
    next(iterator)
    state = iterator.state()
    ahead = [next(iterator)["input_ids"].tolist() for _ in range(3)]
    iterator.restore(state)
    assert [next(iterator)["input_ids"].tolist() for _ in range(3)] == ahead
    iterator.close()
    next(iterator)  # goes on after being closed
    assert iterator.state()["sequences_consumed"] == 20


def test_epochs_are_counted(counting: Make):
    iterator = counting(TOKENS, validation_fraction=0).train_iterator(8)
    seen = []
    for _ in range(6):
        seen.append(iterator.epoch)
        next(iterator)
    assert seen == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sequence_length": 3}, "sequence_length was 4 and is 3"),
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"shuffle": False}, "shuffle was True and is False"),
        ({"validation_fraction": 0.5}, "train_sequences was 22 and is 12"),
        ({"tokens": TOKENS + 1}, "fingerprint was '"),
    ],
)
def test_a_position_in_other_data_is_refused(counting: Make, options: dict, expected: str):
    state = counting(TOKENS).train_iterator(2).state()
    other = counting(**({"tokens": TOKENS} | options)).train_iterator(2)
    with pytest.raises(DataError) as error:
        other.restore(state)
    assert str(error.value).startswith("the data position belongs to other data: ")
    assert expected in str(error.value)
    assert other.state()["sequences_consumed"] == 0


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"sequences_consumed": "7"}, {"stream": None}, {"version": None}]
)
def test_what_is_no_position_is_refused(counting: Make, change: dict):
    iterator = counting(TOKENS).train_iterator(2)
    with pytest.raises(DataError, match="is not one that this jspeed writes"):
        iterator.restore(iterator.state() | change)
    with pytest.raises(DataError, match="is -1 sequences consumed"):
        iterator.restore(iterator.state() | {"sequences_consumed": -1})


def test_impossible_shares(counting: Make):
    dataset = counting(TOKENS)
    with pytest.raises(DataError, match=r"batch_size is 0\. Expected at least 1"):
        dataset.train_iterator(0)
    with pytest.raises(DataError, match=r"process_index is 2 and process_count 2\. Expected"):
        dataset.train_iterator(1, 2, 2)
    with pytest.raises(DataError, match="process_index is -1 and process_count 2"):
        dataset.validation_batches(1, process_index=-1, process_count=2)


def test_a_bad_token_stops_the_iterator_at_its_batch(counting: Make):
    # Ids 88 and above are outside: sequence 21, since its last label is 88, and sequence 22.
    dataset = counting(TOKENS, vocab_size=88, shuffle=False, validation_fraction=0)
    iterator = dataset.train_iterator(7)
    for _ in range(3):
        next(iterator)
    text = r'position 88 is 88, and the vocabulary has 88 ids .*"data.tokenizer.vocab_size"'
    for _ in range(2):  # again, rather than going on behind it
        with pytest.raises(DataError, match=text):
            next(iterator)
    assert iterator.state()["sequences_consumed"] == 21


def test_a_missing_package_names_the_extra(counting: Make, monkeypatch: pytest.MonkeyPatch):
    dataset = counting(TOKENS)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(MissingExtraError, match=r'"grain".*pip install "jspeed\[data\]"'):
        dataset.train_iterator(2)


def test_batches_are_read_ahead_by_one_thread(counting: Make):
    dataset = counting(TOKENS)
    names = []
    make = dataset._make_batch
    dataset._make_batch = lambda *windows, **masking: (  # type: ignore[method-assign]
        names.append(threading.current_thread().name),
        make(*windows, **masking),
    )[1]
    iterator = dataset.train_iterator(2)
    next(iterator)
    next(iterator)
    iterator.close()
    assert len(set(names)) == 1
    assert threading.current_thread().name not in names

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jspeed.core.errors import DataError
from jspeed.data import IGNORED_LABEL, TextDataset, build_dataset

Make = Callable[..., TextDataset]


def _validation(dataset: TextDataset, batch: int, limit: int | None, processes: int = 1):
    """Returns the global batches, joined over processes."""
    parts = [
        list(dataset.validation_batches(batch, limit, process, processes))
        for process in range(processes)
    ]
    return [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_validation_covers_the_held_out_sequences_once(counting: Make):
    dataset = counting(4 * 100 + 1, validation_fraction=0.1)
    batches = _validation(dataset, batch=4, limit=None)
    assert len(batches) == 3
    assert all(batch["input_ids"].shape == (4, 4) for batch in batches)
    counted = [
        row[0] // 4
        for batch in batches
        for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        if (labels != IGNORED_LABEL).all()
    ]
    assert sorted(counted) == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert counted != sorted(counted)  # a few batches are a sample of the whole corpus
    ignored = batches[-1]["labels"][2:]
    assert (ignored == -100).all()
    assert (batches[-1]["input_ids"] >= 0).all()


def test_training_never_sees_the_held_out_sequences(counting: Make):
    dataset = counting(4 * 100 + 1, validation_fraction=0.1)
    iterator = dataset.train_iterator(45)
    seen = np.concatenate([next(iterator)["input_ids"][:, 0] // 4 for _ in range(2)])
    assert sorted(seen) == [i for i in range(100) if i % 10 != 5]


@pytest.mark.parametrize("processes", [2, 4])
def test_validation_does_not_depend_on_the_number_of_processes(counting: Make, processes: int):
    dataset = counting(4 * 100 + 1, validation_fraction=0.1)
    alone = _validation(dataset, batch=8, limit=None)
    shared = _validation(dataset, batch=8 // processes, limit=None, processes=processes)
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        counted = one["labels"] != IGNORED_LABEL
        assert np.array_equal(counted, other["labels"] != IGNORED_LABEL)
        for key in one:
            assert np.array_equal(one[key][counted], other[key][counted])


def test_validation_is_the_same_for_every_seed_and_call(counting: Make):
    first = _validation(counting(401, validation_fraction=0.1), 4, 2)
    for dataset in (counting(401, validation_fraction=0.1, seed=9),):
        again = _validation(dataset, 4, 2)
        assert len(again) == 2
        assert all(
            np.array_equal(a["input_ids"], b["input_ids"])
            for a, b in zip(first, again, strict=True)
        )


def test_limits(counting: Make):
    dataset = counting(401, validation_fraction=0.5)
    assert len(_validation(dataset, 2, 8)) == 8
    assert len(list(dataset.validation_batches(2))) == 8
    assert _validation(dataset, 2, 0) == []
    assert _validation(counting(401, validation_fraction=0), 2, None) == []
    with pytest.raises(DataError, match="limit is -1 validation batches"):
        dataset.validation_batches(2, -1)


def test_documents_are_masked_on_request(text_folder: Path, tmp_path: Path):
    dataset = build_dataset(
        source=text_folder,
        tokenizer_kind="byte",
        sequence_length=50,
        validation_fraction=0,
        document_mask=True,
        shuffle=False,
        cache_dir=tmp_path,
    )
    batch = next(dataset.train_iterator(2))
    assert sorted(batch) == ["input_ids", "labels", "positions", "segment_ids"]
    # "a.txt" has 29 bytes and its separator, so the second document opens at token 30.
    assert batch["segment_ids"][0].tolist() == [1] * 30 + [2] * 20
    assert batch["positions"][0].tolist() == [*range(30), *range(20)]
    assert batch["segment_ids"][1].tolist() == [1] * 50
    assert batch["input_ids"][0, 30] == dataset.tokenizer.separator_id


def test_documents_of_unknown_tokens_cannot_be_masked(counting: Make):
    with pytest.raises(DataError) as error:
        counting(100, document_mask=True)
    assert str(error.value).startswith('"data.document_mask": the documents in the token files "')
    assert '{"kind": "file", "path": "tokenizer.json"}' in str(error.value)

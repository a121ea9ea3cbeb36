"""A data set of packed sequences: its training iterator and its validation batches."""

import functools
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from jspeed.core.errors import DataError
from jspeed.data.masking import Masking
from jspeed.data.packing import IGNORED_LABEL, Batch, PackedSequences, Split, make_batch
from jspeed.data.pipeline import (
    ProcessShare,
    StreamIdentity,
    TrainIterator,
    ordered_windows,
)
from jspeed.data.tokenizer import Tokenizer
from jspeed.data.tokens import TokenStream

# Evaluation is on the same sequences in every run, whatever its seed.
_VALIDATION_SEED = 0


class TextDataset:
    """Packed token sequences with a training and a validation part; made by `build_dataset`.

    Attributes:
      tokenizer: between text and ids.
      sequence_length: tokens per row of a batch.
      tokens: the number of tokens in the whole corpus, separators included.
      split: how many sequences there are, and which are for validation.
      document_mask: whether batches tell documents apart.
      vocab_size: of a model of these data: the tokenizer's ids, and the mask where there is one.
    """

    def __init__(
        self,
        stream: TokenStream,
        tokenizer: Tokenizer,
        *,
        name: str,
        sequence_length: int,
        validation_fraction: float,
        document_mask: bool,
        shuffle: bool,
        seed: int,
        masked: bool = False,
    ) -> None:
        """Packs `stream`; `name` is the source's name in messages, the rest as `build_dataset`.

        Raises:
          DataError: if the stream is too short or cannot be split.
        """
        if document_mask and tokenizer.separator_id is None:
            raise DataError(
                f'"data.document_mask": the documents in the token files "{name}" cannot be told '
                "apart, since their separator is unknown. Name their tokenizer with "
                '"data.tokenizer": {"kind": "file", "path": "tokenizer.json"}.'
            )
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.tokens = len(stream)
        self.document_mask = document_mask
        size, separator, mask = tokenizer.vocab_size, tokenizer.separator_id, tokenizer.mask_id
        self._masking = Masking(size, seed, separator, mask) if masked else None
        self._validation_masking = (
            Masking(size, _VALIDATION_SEED, separator, mask) if masked else None
        )
        self.vocab_size = size + (masked and mask is None)
        self._sequences = PackedSequences(stream, sequence_length=sequence_length, name=name)
        self.split = Split.of(len(self._sequences), validation_fraction)
        self._identity = StreamIdentity(
            fingerprint=stream.fingerprint,
            sequence_length=sequence_length,
            train_sequences=self.split.training,
            shuffle=shuffle,
            seed=seed if shuffle else 0,  # without shuffling any seed means the same order
        )

    def train_iterator(
        self, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> TrainIterator:
        """Returns an endless iterator over this process's rows of the training batches.

        The global batch has `batch_size * process_count` rows. Its sequences and their order do not
        depend on how it is divided among processes; a step consumes them, shuffled anew in each
        epoch, and batches run across the border of epochs.

        Args:
          batch_size: the rows of this process.
          process_index: which of the processes this is.
          process_count: how many there are.

        Returns:
          An iterator of dictionaries: `input_ids` and `labels` (the next tokens, or of masked data
          the masked ones; see `Masking`), and under
          `document_mask` also `segment_ids` (from 1) and `positions`; all of them
          int32[batch_size, sequence_length]. It has `state()` and `restore(state)`.

        Raises:
          DataError: if the numbers are impossible.
          MissingExtraError: if the package `grain` is not installed.
        """
        share = ProcessShare(batch_size, process_index, process_count)
        windows = ordered_windows(
            _Part(self._sequences, self.split, training=True),
            shuffle=self._identity.shuffle,
            seed=self._identity.seed,
            repeat=True,
        )
        make = functools.partial(self._make_batch, masking=self._masking)
        return TrainIterator(windows, make, share=share, identity=self._identity)

    def validation_batches(
        self, batch_size: int, limit: int | None = 8, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Returns this process's rows of the validation batches, the same ones each time.

        The sequences are taken in a fixed random order, so that a few batches are a fair sample of
        the corpus. The last global batch is filled up with rows whose labels are all -100, which
        are never counted.

        Args:
          batch_size: the rows of this process.
          limit: the largest number of batches; all if None.
          process_index: which of the processes this is.
          process_count: how many there are.

        Returns:
          An iterator of dictionaries as those of `train_iterator`; empty if nothing is held out.

        Raises:
          DataError: if the numbers are impossible.
          MissingExtraError: if the package `grain` is not installed.
        """
        share = ProcessShare(batch_size, process_index, process_count)
        if limit is not None and limit < 0:
            raise DataError(
                f"limit is {limit} validation batches. Expected 0 or more, or None for all."
            )
        return islice(self._validation(share), limit)

    def _validation(self, share: ProcessShare) -> Iterator[Batch]:
        total = self.split.held_out
        windows = ordered_windows(
            _Part(self._sequences, self.split, training=False),
            shuffle=True,
            seed=_VALIDATION_SEED,
            repeat=False,
        )
        for start in range(0, total, share.global_batch):
            rows = share.rows(start)
            stacked = np.stack([windows[min(row, total - 1)] for row in rows])
            batch = self._make_batch(stacked, rows, masking=self._validation_masking)
            batch["labels"][max(0, total - rows.start) :] = IGNORED_LABEL
            yield batch

    def _make_batch(
        self, windows: NDArray[np.int32], numbers: Sequence[int], *, masking: Masking | None
    ) -> Batch:
        separator = self.tokenizer.separator_id if self.document_mask else None
        batch = make_batch(windows, separator_id=separator)
        return batch if masking is None else masking.apply(batch, numbers)


class _Part:
    """The training or the validation sequences."""

    def __init__(self, sequences: PackedSequences, split: Split, *, training: bool) -> None:
        self._sequences = sequences
        self._length = split.training if training else split.held_out
        self._index = split.training_index if training else split.validation_index

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        return self._sequences[self._index(index)]

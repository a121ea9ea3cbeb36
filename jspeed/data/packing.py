"""Cutting the token stream into sequences, and parting them into training and validation.

Everything here is arithmetic on indices: no list of sequences is made, however long the stream is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jspeed.core.errors import DataError
from jspeed.data.tokens import TokenStream

Batch = dict[str, NDArray[np.int32]]

# The label of a position whose loss is not counted.
IGNORED_LABEL = -100


class PackedSequences:
    """The stream as windows of `sequence_length + 1` tokens that overlap in one token.

    The first `sequence_length` tokens of a window are inputs and the last ones labels, so every
    token of the stream but the very first is a label exactly once. A rest shorter than a sequence
    is left out.
    """

    def __init__(self, stream: TokenStream, *, sequence_length: int, name: str) -> None:
        """Cuts `stream`; `name` is the source's name in messages.

        Raises:
          DataError: if there is not a single whole window.
        """
        if sequence_length < 1:
            raise DataError(f'"data.sequence_length": {sequence_length}. Expected at least 1.')
        if len(stream) == 0:
            raise DataError(f'"data.source": the corpus "{name}" is empty: there is no text in it.')
        self.sequence_length = sequence_length
        self._stream = stream
        self._count = (len(stream) - 1) // sequence_length
        if self._count == 0:
            raise DataError(
                f'"data.source": the corpus "{name}" has {len(stream)} tokens, and one sequence '
                f'takes {sequence_length + 1} ("data.sequence_length" {sequence_length} and one '
                "more for the last label). Use more text or shorter sequences."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """Returns window `index`, int32[sequence_length + 1]."""
        start = index * self.sequence_length
        return self._stream.read(start, start + self.sequence_length + 1)


@dataclass(frozen=True)
class Split:
    """Which of `total` sequences are for validation: `held_out`, spread evenly over the corpus.

    The smaller part is spread over the larger: the sequences are taken in as many equal groups as
    it has, and it gets the middle of each group. What is left behind the last group goes to the
    larger part.
    """

    total: int
    held_out: int

    @classmethod
    def of(cls, total: int, fraction: float) -> "Split":
        """Returns the split that holds out `fraction` of `total` sequences.

        At least one is held out unless `fraction` is 0, and at least one is left to train on.

        Raises:
          DataError: if `fraction` is not in `[0, 1)`, or nothing is left to hold out.
        """
        if not 0 <= fraction < 1:
            raise DataError(
                f'"data.validation_fraction": {fraction}. Expected at least 0 and below 1.'
            )
        if fraction and total < 2:
            raise DataError(
                f'"data.validation_fraction": {fraction} of {total} sequence leaves none to train '
                "on. Use more text, shorter sequences, or a fraction of 0."
            )
        most = total // 2 if fraction <= 0.5 else total - 1
        return cls(total, min(max(1, round(total * fraction)), most) if fraction else 0)

    @property
    def training(self) -> int:
        """The number of training sequences."""
        return self.total - self.held_out

    def validation_index(self, i: int) -> int:
        """Returns where validation sequence `i` stands among all sequences."""
        return self._spread(i) if self.held_out <= self.training else self._between(i)

    def training_index(self, i: int) -> int:
        """Returns where training sequence `i` stands among all sequences."""
        return self._between(i) if self.held_out <= self.training else self._spread(i)

    @property
    def _few(self) -> int:
        return min(self.held_out, self.training)

    def _spread(self, i: int) -> int:
        """Where sequence `i` of the smaller part stands."""
        group = self.total // self._few
        return i * group + group // 2

    def _between(self, i: int) -> int:
        """Where sequence `i` of the larger part stands."""
        if not self._few:
            return i
        group = self.total // self._few
        which, place = divmod(i, group - 1)
        if which >= self._few:
            return i + self._few
        return which * group + place + (place >= group // 2)


def make_batch(windows: NDArray[np.int32], *, separator_id: int | None) -> Batch:
    """Returns the arrays of a batch from windows, int32[batch, sequence_length + 1].

    Args:
      windows: the packed tokens.
      separator_id: where given, the id at which a document begins; the batch then tells documents
        apart.

    Returns:
      `input_ids` and `labels` (the next tokens), int32[batch, sequence_length]; with a separator
      also `segment_ids`, which count the documents of a row from 1, and `positions`, which begin at
      0 in each of them.
    """
    input_ids, labels = windows[:, :-1].copy(), windows[:, 1:].copy()
    batch: Batch = {"input_ids": input_ids, "labels": labels}
    if separator_id is not None:
        opens = input_ids == separator_id
        opens[:, 0] = True  # a row that begins inside a document begins a segment all the same
        place = np.arange(input_ids.shape[1], dtype=np.int32)
        batch["segment_ids"] = np.cumsum(opens, axis=1, dtype=np.int32)
        batch["positions"] = place - np.maximum.accumulate(np.where(opens, place, 0), axis=1)
    return batch

"""The Grain pipeline: which sequences stand in which batch, read ahead by a background thread.

The order is fixed in global terms. Sequences are numbered `0, 1, 2, ...` through all epochs; a step
takes the next `batch_size * process_count` numbers, and process `p` takes the `p`-th block of
`batch_size` of them. The position of a run is therefore a single number, the sequences consumed,
and holds for any number of processes and any batch size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jspeed.core.errors import DataError
from jspeed.data.cache import digest
from jspeed.data.extras import import_extra
from jspeed.data.packing import Batch

# Batches read ahead of the step; a few are enough, since reading is far faster than training.
_PREFETCH_BATCHES = 4
_STATE_VERSION = 1
# More batches than any run takes; times the batch size it still fits 64 bits.
_ENDLESS = 1 << 40

MakeBatch = Callable[[NDArray[np.int32], Sequence[int]], Batch]
"""Makes a batch of stacked windows and their numbers in the run."""


@dataclass(frozen=True)
class StreamIdentity:
    """What must be equal for a data position to mean the same sequence."""

    fingerprint: str
    sequence_length: int
    train_sequences: int
    shuffle: bool
    seed: int


@dataclass(frozen=True)
class ProcessShare:
    """The rows of a global batch that one process reads: block `index` of `count` blocks."""

    batch_size: int
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(
                f"batch_size is {self.batch_size}. Expected at least 1 row per process."
            )
        if not 0 <= self.index < self.count:
            raise DataError(
                f"process_index is {self.index} and process_count {self.count}. Expected "
                "0 <= process_index < process_count."
            )

    @property
    def global_batch(self) -> int:
        """The rows of all processes together."""
        return self.batch_size * self.count

    def rows(self, start: int) -> range:
        """Returns the sequence numbers of this process if the global batch begins at `start`."""
        first = start + self.index * self.batch_size
        return range(first, first + self.batch_size)


class Windows(Protocol):
    """Random access to windows of tokens, int32[sequence_length + 1] each."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> NDArray[np.int32]: ...


def ordered_windows(windows: Windows, *, shuffle: bool, seed: int, repeat: bool) -> Windows:
    """Returns the windows in training order.

    Only indices are shuffled, one at a time, so nothing grows with the corpus.

    Args:
      windows: the windows in the order of the corpus.
      shuffle: whether they come in random order, another one in each epoch.
      seed: of the random order; any integer.
      repeat: whether indices beyond the last window go on with the next epoch.

    Raises:
      MissingExtraError: if the package `grain` is not installed.
    """
    grain = import_extra("grain", needed_for="reading training data")
    dataset = grain.MapDataset.source(windows)
    if shuffle:
        # Grain shuffles epoch `e` with `seed + e`; mixed first, seeds 0 and 1 share no epochs.
        dataset = dataset.shuffle(seed=int(digest([str(seed)])[:8], 16))
    return dataset.repeat() if repeat else dataset


class TrainIterator(Iterator[Batch]):
    """This process's rows of the training batches, without end; see `TextDataset`."""

    def __init__(
        self,
        windows: Windows,
        make_batch: MakeBatch,
        *,
        share: ProcessShare,
        identity: StreamIdentity,
    ) -> None:
        """Reads from endless `windows`."""
        self._windows = windows
        self._make_batch = make_batch
        self._share = share
        self._identity = identity
        self._consumed = 0
        self._batches: Any = None

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          DataError: if a token in it is outside the vocabulary; the position stays before it.
        """
        if self._batches is None:
            self._batches = self._read_from(self._consumed)
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()  # Grain would go on behind the batch that failed
            raise
        self._consumed += self._share.global_batch
        return batch

    @property
    def epoch(self) -> int:
        """How often all training sequences have been consumed."""
        return self._consumed // self._identity.train_sequences

    def state(self) -> dict[str, Any]:
        """Returns the position as plain JSON values: the sequences consumed by all processes.

        It also says of which data, which `restore` compares. Batches that were read ahead and not
        yet returned do not count.
        """
        return {
            "version": _STATE_VERSION,
            "sequences_consumed": self._consumed,
            "stream": asdict(self._identity),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at a position that `state` gave, with any batch size and number of processes.

        Raises:
          DataError: if it is no such position, or one in other data; the text names each
            difference.
        """
        self._consumed = _checked_position(state, self._identity)
        self.close()

    def close(self) -> None:
        """Ends the reading ahead; the next `next()` starts it again at the same position."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _read_from(self, start: int) -> Any:
        grain = import_extra("grain", needed_for="reading training data")
        source = _Batches(self._windows, self._make_batch, self._share, start)
        # Threads, not processes: a forked process would inherit locks that JAX's threads hold.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH_BATCHES)
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))


@dataclass(frozen=True)
class _Batches:
    """Random access to the batches of one process from sequence number `start` on."""

    windows: Windows
    make_batch: MakeBatch
    share: ProcessShare
    start: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Batch:
        rows = self.share.rows(self.start + index * self.share.global_batch)
        return self.make_batch(np.stack([self.windows[row] for row in rows]), rows)


def _checked_position(state: dict[str, Any], identity: StreamIdentity) -> int:
    consumed, stream = state.get("sequences_consumed"), state.get("stream")
    version = state.get("version")
    if version != _STATE_VERSION or not isinstance(consumed, int) or not isinstance(stream, dict):
        raise DataError(
            f"the data position is not one that this jspeed writes (version {version!r}, keys "
            f"{sorted(state)}). Expected version {_STATE_VERSION}. Start the data anew."
        )
    if consumed < 0:
        raise DataError(f"the data position is {consumed} sequences consumed. Expected 0 or more.")
    differences = [
        f"{key} was {stream.get(key)!r} and is {value!r}"
        for key, value in asdict(identity).items()
        if stream.get(key) != value
    ]
    if differences:
        raise DataError(
            f"the data position belongs to other data: {'; '.join(differences)}. (A fingerprint "
            "stands for corpus and tokenizer.) Resume with the data of the checkpoint, or start "
            "them anew."
        )
    return consumed

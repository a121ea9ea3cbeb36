"""Token ids on disk: written once from a text corpus, then memory-mapped and never read whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from jspeed.core.errors import DataError
from jspeed.data.cache import digest, publish
from jspeed.data.corpus import Piece, TextCorpus
from jspeed.data.tokenizer import Tokenizer

TokenDtype = Literal["uint16", "uint32"]

# Raised whenever the same text and tokenizer give other files.
_REVISION = "1"
# How much text is handed to the tokenizer at once.
_BATCH_CHARACTERS = 4 << 20


class TokenStream:
    """One long sequence of token ids, memory-mapped from files read one behind the other.

    `len(stream)` is the number of tokens.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Path, NDArray[np.integer]]],
        *,
        vocab_size: int,
        fingerprint: str,
    ) -> None:
        """Joins `parts`, pairs of a file and its ids; see `open_token_files`."""
        self.fingerprint = fingerprint
        self._paths = [path for path, _ in parts]
        # Plain views: slicing a `memmap` itself costs several times as much.
        self._arrays = [np.asarray(array) for _, array in parts]
        self._ends = np.cumsum([array.size for array in self._arrays], dtype=np.int64)
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._arrays else 0

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """Returns the ids at `[start, stop)`, int32, with `0 <= start < stop <= len(self)`.

        Raises:
          DataError: if one of them is not in the vocabulary; the text names file and position.
        """
        pieces = []
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[part]) - self._arrays[part].size
            piece = self._arrays[part][start - begin : stop - begin]
            self._check(piece, part, start - begin)
            pieces.append(piece.astype(np.int32))
            start += piece.size
            part += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _check(self, ids: NDArray[np.integer], part: int, offset: int) -> None:
        if int(ids.max()) < self._vocab_size and int(ids.min()) >= 0:
            return
        at = int(np.argmax((ids >= self._vocab_size) | (ids < 0)))
        raise DataError(
            f'"{self._paths[part]}": the token at position {offset + at} is {ids[at]}, and the '
            f"vocabulary has {self._vocab_size} ids (0 to {self._vocab_size - 1}). Set "
            '"data.tokenizer.vocab_size" (or "data.tokenizer.path") to what the file was made '
            'with, and check "data.dtype".'
        )


def open_token_files(
    files: Sequence[Path], *, dtype: TokenDtype, vocab_size: int, fingerprint: str | None = None
) -> TokenStream:
    """Returns the token files as one stream, memory-mapped.

    Args:
      files: `.npy` files (any integer dtype, one dimension), or raw little-endian files of `dtype`.
      dtype: the type of the ids in raw files.
      vocab_size: ids at or above it are refused when they are read.
      fingerprint: stands for the content; made from sizes, beginnings and ends if None.

    Raises:
      DataError: if a file cannot be read, is no list of integers, is not a whole number of ids
        long, or has ids of a type too small for the vocabulary.
    """
    parts = [(path, _map_file(path, dtype, vocab_size)) for path in files]
    if fingerprint is None:
        fingerprint = digest(item for _, array in parts for item in _sample(array))
    return TokenStream(
        [(path, array) for path, array in parts if array.size],
        vocab_size=vocab_size,
        fingerprint=fingerprint,
    )


def tokenize_corpus(
    corpus: TextCorpus, tokenizer: Tokenizer, *, corpus_key: str, dtype: TokenDtype, cache_dir: Path
) -> TokenStream:
    """Returns the corpus as token ids, each document behind a separator; encoded once, then cached.

    Args:
      corpus: the text.
      tokenizer: must have a separator.
      corpus_key: `corpus.key()`.
      dtype: the type of the ids on disk.
      cache_dir: where the ids are kept.

    Raises:
      DataError: if the vocabulary does not fit `dtype`, or the corpus cannot be read.
    """
    check_dtype(tokenizer.vocab_size, dtype)
    fingerprint = digest([_REVISION, corpus_key, tokenizer.fingerprint])
    path = cache_dir / f"tokens-{fingerprint}.{dtype}.bin"
    if not path.is_file():
        publish(path, lambda stream: _write_tokens(stream, corpus, tokenizer, dtype))
    return open_token_files(
        [path], dtype=dtype, vocab_size=tokenizer.vocab_size, fingerprint=fingerprint
    )


def check_dtype(vocab_size: int, dtype: TokenDtype) -> None:
    """Raises a `DataError` if ids below `vocab_size` do not fit into `dtype`."""
    if dtype not in ("uint16", "uint32"):
        raise DataError(f'"data.dtype": {dtype!r:.40}. Expected "uint16" or "uint32".')
    largest = int(np.iinfo(dtype).max)
    if vocab_size - 1 > largest:
        raise DataError(
            f'"data.dtype": {dtype} holds ids up to {largest}, and the vocabulary has '
            f'{vocab_size} ids. Set "data.dtype": "uint32" or a smaller vocabulary.'
        )


def _map_file(path: Path, dtype: TokenDtype, vocab_size: int) -> NDArray[np.integer]:
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            check_dtype(vocab_size, dtype)
            array = _map_raw(path, dtype)
    except (OSError, ValueError) as error:
        raise DataError(f'"{path}": cannot be read as token ids ({error}).') from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f'"{path}": holds {array.dtype} of shape {array.shape}. Expected a list of integers.'
        )
    return array


def _map_raw(path: Path, dtype: TokenDtype) -> NDArray[np.integer]:
    raw = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size % raw.itemsize:
        raise DataError(
            f'"{path}": {size} bytes are not a whole number of {dtype} ids of {raw.itemsize} '
            'bytes. Set "data.dtype" to the type of the file, or write it again.'
        )
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=raw, mode="r") if size else np.empty(0, raw)


def _sample(array: NDArray[np.integer]) -> Iterator[str | bytes]:
    """Yields what tells a token file from others without reading all of it."""
    yield f"{array.size} {array.dtype.str}"
    yield array[:4096].tobytes()
    yield array[-4096:].tobytes()


def _write_tokens(
    stream: BinaryIO, corpus: TextCorpus, tokenizer: Tokenizer, dtype: TokenDtype
) -> None:
    raw = np.dtype(dtype).newbyteorder("<")
    for batch in _batches(corpus.pieces()):
        for piece, ids in zip(batch, tokenizer.encode_batch([p.text for p in batch]), strict=True):
            opening = [tokenizer.separator_id] if piece.opens_document else []
            stream.write(np.array([*opening, *ids], dtype=raw).tobytes())


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yields the pieces in groups of bounded size: the corpus never stands in memory whole."""
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group

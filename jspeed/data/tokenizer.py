"""Text to token ids and back: the interface, and the tokenizers that need no other package."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from jspeed.core.errors import DataError
from jspeed.data.cache import digest, publish

TokenizerKind = Literal["bpe", "byte", "file"]

_FORMAT_KEY = "jspeed_tokenizer"


class Tokenizer(ABC):
    """Translates between text and token ids; saved to and loaded from one JSON file.

    Attributes:
      vocab_size: the number of token ids; every id is in `[0, vocab_size)`. A trained tokenizer can
        have fewer ids than were asked for when the corpus is too small to find that many pairs.
      separator_id: the id that stands before each document of the token stream. It opens a document
        when text is generated, and its appearance ends one. None if unknown (see `IdTokenizer`).
      mask_id: the id that stands in the place of tokens to be told, or None if there is none.
    """

    vocab_size: int
    separator_id: int | None
    mask_id: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without a separator."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 (a cut character) become U+FFFD.

        The separator gives its own text where it has one (`<|endoftext|>`), and nothing in a
        `ByteTokenizer`.

        Raises:
          DataError: if an id is outside the vocabulary.
        """

    @abstractmethod
    def to_json(self) -> str:
        """Returns everything that `load` needs as JSON text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `[encode(text) for text in texts]`, in parallel where the tokenizer can."""
        return [self.encode(text) for text in texts]

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer to one JSON file; see `load`."""
        content = self.to_json().encode()
        publish(Path(path), lambda stream: stream.write(content))

    @property
    def fingerprint(self) -> str:
        """A short text that is equal for equal tokenizers and, in practice, only for those."""
        return digest([self.to_json()])

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Returns the tokenizer that `save` wrote, or that of a Hugging Face `tokenizer.json`.

        Raises:
          DataError: if the file is missing, damaged or not a tokenizer.
          MissingExtraError: if it holds a BPE tokenizer and the package `tokenizers` is not
            installed.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
        except OSError as error:
            raise DataError(
                f'"data.tokenizer.path": cannot read "{path}" ({error.strerror or error}). '
                "Expected a tokenizer.json."
            ) from error
        except ValueError as error:  # not UTF-8, or not JSON
            raise DataError(
                f'"data.tokenizer.path": "{path}" is not JSON ({error}). Expected a tokenizer.json.'
            ) from error
        if not isinstance(content, dict):
            raise DataError(
                f'"data.tokenizer.path": "{path}" holds a JSON {type(content).__name__}. '
                "Expected a tokenizer.json, which holds an object."
            )
        if _FORMAT_KEY not in content:
            from jspeed.data.bpe import BpeTokenizer  # here, since it builds on this module

            return BpeTokenizer.from_json(text, origin=str(path))
        return _load_own(content, path)


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 as they are, and id 256 as the separator."""

    vocab_size = 257
    separator_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        check_range(ids, self.vocab_size)
        return bytes(i for i in ids if i != self.separator_id).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({_FORMAT_KEY: "byte"})


class IdTokenizer(Tokenizer):
    """Stands in for the unknown tokenizer of token files; knows its vocabulary's size only."""

    separator_id = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        raise DataError(self._no_text())

    def decode(self, ids: Iterable[int]) -> str:
        raise DataError(self._no_text())

    def to_json(self) -> str:
        return json.dumps({_FORMAT_KEY: "ids", "vocab_size": self.vocab_size})

    def _no_text(self) -> str:
        return (
            f"the data are token files and only the size of their vocabulary ({self.vocab_size}) "
            f"is known, so text "
            'cannot be encoded or decoded. Name their tokenizer with "data.tokenizer": '
            '{"kind": "file", "path": "tokenizer.json"}.'
        )


def _load_own(content: dict[str, object], path: Path) -> Tokenizer:
    kind, size = content[_FORMAT_KEY], content.get("vocab_size")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "ids" and isinstance(size, int):
        return IdTokenizer(size)
    raise DataError(
        f'"data.tokenizer.path": "{path}" names the tokenizer kind {kind!r}. '
        'Expected "byte", "ids" or a Hugging Face tokenizer.json; was it written by a newer jspeed?'
    )


def check_range(ids: Iterable[int], vocab_size: int) -> None:
    """Raises a `DataError` that names the first id outside the vocabulary."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise DataError(
                f"cannot decode token id {i}: the vocabulary has {vocab_size} ids, 0 to "
                f"{vocab_size - 1}. "
                "Were these ids made with another tokenizer?"
            )

"""Text corpora: which files make one up, what stands in them, and a key for their content."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jspeed.core.errors import DataError
from jspeed.data.cache import digest, file_digest

# A long file is handed on in pieces of about this many characters, cut behind a newline.
PIECE_CHARACTERS = 1 << 20


class Piece(NamedTuple):
    """A stretch of text; a document is a piece that opens it and those behind that do not."""

    text: str
    opens_document: bool


@dataclass(frozen=True)
class TextCorpus:
    """Text files, each one document, or JSONL files, each line one document.

    Attributes:
      name: what the run file calls it, for messages.
      root: the folder that file names are relative to, so that a moved corpus keeps its key.
      files: the files in the order of their documents.
      kind: how the files are read.
      text_key: the key of a JSONL object that holds the text.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    kind: Literal["text", "jsonl"]
    text_key: str = "text"

    def key(self) -> str:
        """Returns a short text that changes with the content of the corpus, not with its place.

        Raises:
          DataError: if a file cannot be read.
        """
        parts: list[str | bytes] = [self.kind, self.text_key if self.kind == "jsonl" else ""]
        for path in self.files:
            try:
                parts += [path.relative_to(self.root).as_posix(), file_digest(path)]
            except OSError as error:
                raise _unreadable(path, error) from error
        return digest(parts)

    def size(self) -> int:
        """Returns the number of bytes on disk."""
        return sum(path.stat().st_size for path in self.files)

    def pieces(self) -> Iterator[Piece]:
        """Yields the text in order, never holding more than one piece or line.

        Empty documents are left out.

        Raises:
          DataError: if a file cannot be read or is not what its kind says; the text names file and
            line.
        """
        for path in self.files:
            try:
                yield from (_text_pieces(path) if self.kind == "text" else self._jsonl_pieces(path))
            except UnicodeDecodeError as error:
                raise DataError(
                    f'"{path}", line {_undecodable_line(path)}: not UTF-8 text ({error.reason}). '
                    "Convert the file, or take it out of the corpus."
                ) from error
            except OSError as error:
                raise _unreadable(path, error) from error

    def _jsonl_pieces(self, path: Path) -> Iterator[Piece]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _jsonl_text(line, self.text_key, f'"{path}", line {number}')
                    if text:
                        yield Piece(text, opens_document=True)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f'"{path}": cannot be read ({error.strerror or error}).')


def _text_pieces(path: Path) -> Iterator[Piece]:
    opens = True
    # Line ends are kept as they are: the corpus is reproduced to the character.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        while text := stream.read(PIECE_CHARACTERS):
            if not text.endswith("\n"):
                text += stream.readline(PIECE_CHARACTERS)
            yield Piece(text, opens_document=opens)
            opens = False


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0  # the file changed meanwhile


def _jsonl_text(line: bytes, text_key: str, where: str) -> str:
    """Returns the text of one JSONL line; `where` begins the message if there is none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except ValueError as error:  # besides bad syntax, also numbers with thousands of digits
        raise DataError(
            f"{where}: not valid JSON ({error}). Expected one object per line, "
            f'such as {{"{text_key}": "..."}}.'
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f'{where}: a JSON {type(record).__name__}. Expected an object with "{text_key}" in it.'
        )
    if text_key not in record:
        found = ", ".join(f'"{key}"' for key in record) or "no keys"
        raise DataError(
            f'{where}: no key "{text_key}", found {found}. Name the key of the text with '
            '"data.text_key".'
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(
            f'{where}: "{text_key}" is {text!r:.40}. Expected a string; name another key with '
            '"data.text_key".'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'{where}: "{text_key}" has half of a surrogate pair at character {error.start}, which '
            "is no text."
        ) from error
    return text

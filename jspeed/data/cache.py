"""Content keys and files that appear all at once."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from jspeed.core.errors import DataError


def digest(parts: Iterable[str | bytes]) -> str:
    """Returns 24 hexadecimal digits that stand for the sequence of `parts`.

    Each part is hashed with its length, so that `["ab", "c"]` and `["a", "bc"]` differ.
    """
    total = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def file_digest(path: Path) -> bytes:
    """Returns a hash of the whole content of `path`, read in small pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest()


def publish(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Writes a file that either is there in full or is not there at all.

    Several processes may publish the same path at once, since they publish the same content.

    Args:
      path: where the file shall appear; missing folders are made.
      write: is called once with a binary stream.

    Returns:
      `path`.

    Raises:
      DataError: if the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            write(stream)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f'"{path}": cannot be written ({error.strerror or error}). '
            "Free the path or name a folder that can be written."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path

"""Records of bytes in a file, each compared with the checksum that it was written with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from jspeed.core.errors import OffloadError
from jspeed.offload.checksums import fastest_checksum
from jspeed.offload.direct_io import RecordFile, aligned, reason


class Records:
    """A file cut into records, which lie one after another, each from an aligned offset on.

    Their checksums (XXH3, or CRC-32 without the extra `offload`) stay in memory. Safe to use from
    several threads on different records.

    Args:
      file: of `room(sizes)` bytes.
      sizes: bytes of each record.
      name: record -> what it is, in words.
    """

    def __init__(self, file: RecordFile, sizes: Sequence[int], name: Callable[[int], str]) -> None:
        self.file = file
        self._sizes, self._name = sizes, name
        self._offsets = [0, *np.cumsum([aligned(size) for size in sizes], dtype=np.int64).tolist()]
        self._checksum = fastest_checksum()
        self._checksums = np.zeros(len(sizes), np.uint64)

    @staticmethod
    def room(sizes: Sequence[int]) -> int:
        """Bytes of a file of such records."""
        return sum(map(aligned, sizes))

    @property
    def checksum(self) -> str:
        """The kind of checksum."""
        return self._checksum.name

    def write(self, records: range, buffer: np.ndarray, what: str | None = None) -> None:
        """Writes neighbouring records.

        Args:
          records: which.
          buffer: uint8, aligned, as long as they are in the file.
          what: they are, for messages.

        Raises:
          OffloadError: the disk cannot be written.
        """
        for record in records:
            self._checksums[record] = self._checksum.of(self._bytes(records, record, buffer))
        with self._named(records, "written", what):
            self.file.write(buffer, self._offsets[records.start])

    def read(self, records: range, buffer: np.ndarray, what: str | None = None) -> None:
        """Reads neighbouring records; see `write`.

        Raises:
          OffloadError: the disk cannot be read, or gives back something else than was written.
        """
        with self._named(records, "read", what):
            self.file.read(buffer, self._offsets[records.start])
        for record in records:
            found = self._checksum.of(self._bytes(records, record, buffer))
            expected = int(self._checksums[record])
            if found != expected:
                shown, wanted = (f"{x:0{self._checksum.digits}x}" for x in (found, expected))
                raise OffloadError(
                    f'"{self.file.path}": {self._name(record)} is damaged: its checksum is '
                    f"{shown}; {wanted} was written. The disk or its driver lost data."
                )

    @contextmanager
    def _named(self, records: range, done: str, what: str | None) -> Iterator[None]:
        """An error of the disk says which file and records could not be read, or written."""
        try:
            yield
        except OSError as error:
            what = what or self._name(records.start)
            message = f'"{self.file.path}": {what} cannot be {done}: {reason(error)}.'
            raise OffloadError(message) from error

    def _bytes(self, records: range, record: int, buffer: np.ndarray) -> memoryview:
        start = self._offsets[record] - self._offsets[records.start]
        return buffer[start : start + self._sizes[record]].data

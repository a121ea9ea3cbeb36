"""The checksum of what lies on disk: the fastest one that is installed."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import NamedTuple


class Checksum(NamedTuple):
    """A checksum of bytes. Both kinds let other threads run meanwhile.

    Attributes:
      name: for the log.
      digits: hexadecimal ones.
      of: contiguous bytes -> a number below `16**digits`.
    """

    name: str
    digits: int
    of: Callable[[memoryview], int]


def fastest_checksum() -> Checksum:
    """Returns XXH3 of 64 bits where xxhash is installed (extra `offload`), else CRC-32.

    On one core of an EPYC, 59 GB/s against 4.3 GB/s (`docs/decisions/0009-disk-tier.md`): with
    CRC-32 the processor may be slower than the disk.
    """
    try:
        xxhash = importlib.import_module("xxhash")
    except ImportError:
        return Checksum("CRC-32", 8, zlib.crc32)
    return Checksum("XXH3", 16, xxhash.xxh3_64_intdigest)

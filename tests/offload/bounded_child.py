"""Run as a child: two passes over a state, under a limit on this process's memory.

    python -m tests.offload.bounded_child STORE FOLDER CHUNKS ELEMENTS BUFFERS ROOM

Prints JSON: resident bytes before, and their peak (VmHWM) after.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path

import numpy as np

from jspeed.offload import ChunkStore, FileStore, HostStore


def memory(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024


def expected(index: int, elements: int, passes: int) -> tuple[np.ndarray, ...]:
    """A chunk after some passes; all whole numbers below 2**24, so exact."""
    ramp = np.arange(elements, dtype=np.float32) % 1000
    ramp += 1000 * index
    return ramp * 2**passes, ramp + passes, ramp - passes


def main(kind: str, folder: str, chunks: int, elements: int, buffers: int, room: int) -> None:
    limit = memory("VmData") + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before, sizes = memory("VmRSS"), [elements] * chunks
    store: ChunkStore = (
        FileStore(folder, sizes, buffers=buffers) if kind == "files" else HostStore(sizes)
    )
    for index in range(chunks):
        store.write(index, expected(index, elements, 0))
    for _ in range(2):
        for _, (master, mu, nu) in store.pass_over():
            master *= 2
            mu += 1
            nu -= 1
    for index in range(chunks):
        for found, wanted in zip(store.read(index), expected(index, elements, 2), strict=True):
            np.testing.assert_array_equal(found, wanted)
    store.close()
    print(json.dumps({"before": before, "peak": memory("VmHWM")}))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))

"""Passes over an optimizer's state on disk: ours against `dd`, TensorStore and variants.

    python -m benchmarks.disk_tier FOLDER

A pass reads all of the state and writes all of it. What runs in a round runs in turns, since disks
of rented machines are shared and throttled. Needs room for the state once per contestant.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import typer

from benchmarks.interleave import Timings, alternate
from benchmarks.report import machine, markdown_table, versions
from jspeed.offload import FileStore, records
from jspeed.offload.checksums import Checksum, fastest_checksum

TENSORS = 3
MIB = 2**20
Pass = Callable[[], float]


def main(
    folder: Annotated[Path, typer.Argument(help="On the disk to measure; made if not there.")],
    chunks: Annotated[int, typer.Option(min=8, help="Of the state.")] = 24,
    elements: Annotated[int, typer.Option(min=1, help="Of each tensor of a chunk.")] = 4_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each.")] = 5,
) -> None:
    """Prints a table: gigabytes per second, read and written, and processor time."""
    folder.mkdir(parents=True, exist_ok=True)
    gigabytes = 2 * chunks * elements * TENSORS * 4 / 1e9
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        passes = contestants(place, chunks, elements, stack)
        for one in passes.values():
            one()
        timings = alternate(passes, rounds=rounds)
    typer.echo(f"{machine()}; {versions('numpy', 'tensorstore')}")
    typer.echo(f"checksum where none is named: {fastest_checksum().name}")
    typer.echo(f"{gigabytes:.2f} GB a pass, read and written; {rounds} rounds\n")
    header = ("pass", "GB/s median", "slowest", "fastest", "processor s/GB")
    typer.echo(markdown_table(header, [row(timing, gigabytes) for timing in timings]))


def row(timing: Timings, gigabytes: float) -> list[str]:
    """One contestant's line."""
    speeds = [gigabytes / seconds for seconds in timing.seconds]
    processor = statistics.median(timing.cpu_seconds) / gigabytes
    figures = (statistics.median(speeds), min(speeds), max(speeds), processor)
    # Processor time of other processes is not ours to know.
    shown = [f"{figure:.2f}" for figure in figures]
    return [timing.name, *shown[:3], "" if timing.name.startswith("dd") else shown[3]]


def contestants(
    place: Path, chunks: int, elements: int, stack: contextlib.ExitStack
) -> dict[str, Pass]:
    """What passes over the state, by name, with files in `place`; `stack` gives them up."""

    def ours(name: str, tensors: int = TENSORS, **arguments: Any) -> FileStore:
        (place / name).mkdir()
        sizes, names = [elements] * chunks, [f"t{index}" for index in range(tensors)]
        store = FileStore(place / name, sizes, tensors=names, **arguments)
        stack.callback(store.close)
        state = [np.ones(elements, np.float32)] * tensors
        for index in range(chunks):
            store.write(index, state)
        store.flush()
        return store

    apart = [ours(f"apart-{index}", 1, buffers=4) for index in range(TENSORS)]
    with checksum(Checksum("none", 1, lambda _: 0)):
        without = ours("unchecked", buffers=4)
    with checksum(Checksum("CRC-32", 8, zlib.crc32)):
        with_crc = ours("crc", buffers=4)
    size = chunks * elements * TENSORS * 4
    return {
        "dd, reads then writes": disk_dump(place / "dd", size, parts=0),
        "dd, 2 reads and 2 writes at once": disk_dump(place / "dd-2", size, parts=2),
        "FileStore, 3 buffers": over(ours("three", buffers=3)),
        "FileStore, 4 buffers": over(ours("four", buffers=4)),
        "FileStore, 8 buffers": over(ours("eight", buffers=8)),
        "4 buffers, no checksums": over(without),
        "4 buffers, CRC-32": over(with_crc),
        "4 buffers, a file per tensor": over(*apart),
        "4 buffers, through the page cache": over(ours("cached", buffers=4, direct=False)),
        "TensorStore, direct": tensorstore_pass(place / "ts", chunks, elements, "direct"),
        "TensorStore, page cache": tensorstore_pass(place / "ts-c", chunks, elements, "default"),
    }


def over(*stores: FileStore) -> Pass:
    """A pass over stores side by side, which changes one element of each chunk."""

    def go() -> float:
        for chunk in zip(*(store.pass_over() for store in stores), strict=True):
            for _, state in chunk:
                state[0][0] += 1
        return 0.0

    return go


@contextlib.contextmanager
def checksum(chosen: Checksum) -> Iterator[None]:
    """Stores that are made within use this checksum."""
    with mock.patch.object(records, "fastest_checksum", return_value=chosen):
        yield


def disk_dump(path: Path, size: int, *, parts: int) -> Pass:
    """`dd` past the page cache, from one file and to another: the limit.

    Args:
      path: the file to read, made here.
      size: bytes to read and to write.
      parts: 0: a read, then a write; else as many reads and as many writes at once, of a part each.
    """
    blocks = -(-size // (16 * MIB * max(1, parts)))
    other = path.with_suffix(".out")

    def start(*options: str) -> subprocess.Popen[bytes]:
        command = ("dd", "bs=16M", f"count={blocks}", *options)
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def write(to: Path, part: int) -> subprocess.Popen[bytes]:
        place = f"seek={part * blocks}"
        return start("if=/dev/zero", f"of={to}", place, "oflag=direct", "conv=notrunc")

    def read(part: int) -> subprocess.Popen[bytes]:
        return start(f"if={path}", "of=/dev/null", f"skip={part * blocks}", "iflag=direct")

    def finish(*processes: subprocess.Popen[bytes]) -> None:
        codes = [process.wait() for process in processes]
        assert not any(codes), f"dd ended with {codes}"

    def go() -> float:
        if parts:
            finish(*map(read, range(parts)), *(write(other, part) for part in range(parts)))
        else:
            finish(read(0))
            finish(write(other, 0))
        return 0.0

    for part in range(max(1, parts)):
        finish(write(path, part))
    return go


def tensorstore_pass(place: Path, chunks: int, elements: int, mode: str) -> Pass:
    """A pass with TensorStore: a value per chunk, 4 at a time, without waiting for `fsync`."""
    import tensorstore

    context = {
        "file_io_mode": {"mode": mode},
        "file_io_sync": False,
        "file_io_locking": {"mode": "none"},
    }
    store = tensorstore.KvStore.open(
        {"driver": "file", "path": f"{place}/", "context": context}
    ).result()

    def keys() -> Iterator[str]:
        return (f"chunk{index}" for index in range(chunks))

    def go() -> float:
        following, writes = keys(), deque()
        reads = deque((key, store.read(key)) for key, _ in zip(following, range(2), strict=False))
        while reads:
            key, reading = reads.popleft()
            state = np.frombuffer(reading.result().value, np.float32).copy()  # writable
            state[0] += 1
            writes.append(store.write(key, state.tobytes()))
            if len(writes) == 2:
                writes.popleft().result()
            if (after := next(following, None)) is not None:
                reads.append((after, store.read(after)))
        for write in writes:
            write.result()
        return 0.0

    for key in keys():
        store.write(key, np.ones(TENSORS * elements, np.float32).tobytes()).result()
    return go


if __name__ == "__main__":
    typer.run(main)

"""The disk tier: where the bytes lie, what runs ahead and behind, and what stays in memory."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jspeed.core.errors import OffloadError
from jspeed.offload import FileStore, checksums
from jspeed.offload.capacity import file_system
from tests.offload.state_files import FILE, PAGE, SIZES, chunk, filled, go_over, offset

MIB = 2**20


@pytest.mark.parametrize("buffers", [3, 4, len(SIZES), 20])
@pytest.mark.parametrize("direct", [None, False])
def test_the_bytes_lie_in_the_file(tmp_path: Path, buffers: int, direct: bool | None) -> None:
    store = filled(tmp_path, buffers=buffers, direct=direct)
    go_over(store)
    for index, (_, mu, _) in store.pass_over():
        assert index < len(SIZES)
        mu *= 5
    content = (tmp_path / FILE).read_bytes()
    assert len(content) == offset(len(SIZES) - 1, 2) + PAGE
    for index, size in enumerate(SIZES):
        master, mu, nu = chunk(index)
        for tensor, expected in enumerate((master + 1, (mu + 1) * 5, nu + 1)):
            found = np.frombuffer(content, np.float32, size, offset(index, tensor))
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(store.read(index)[tensor], expected)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_are_reserved_before_they_are_written(tmp_path: Path) -> None:
    store = FileStore(tmp_path, SIZES, buffers=3)
    found = (tmp_path / FILE).stat()
    assert found.st_blocks * 512 >= found.st_size == offset(len(SIZES) - 1, 2) + PAGE
    store.close()


def test_a_pass_that_is_left_reads_and_writes_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)
    for index, (master, _, _) in store.pass_over():
        master += 1
        if index == 4:
            break
    content = (tmp_path / FILE).read_bytes()
    found = np.frombuffer(content, np.float32, SIZES[4], offset(4, 0))
    np.testing.assert_array_equal(found, chunk(4)[0])
    monkeypatch.setattr(os, "preadv", missing)
    monkeypatch.setattr(os, "pwritev", missing)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_transfers_that_the_kernel_cuts_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("preadv", "pwritev"):
        whole = getattr(os, name)

        def part(
            descriptor: int,
            buffers: list[memoryview],
            at: int,
            whole: Callable[..., int] = whole,
        ) -> int:
            return whole(descriptor, [buffers[0][:PAGE]], at)

        monkeypatch.setattr(os, name, part)
    store = filled(tmp_path)
    go_over(store)
    np.testing.assert_array_equal(store.read(3)[2], chunk(3)[2] + 1)
    store.close()


def test_reads_run_ahead_as_far_as_the_buffers_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, buffers=4)
    starts = {offset(index, 0): index for index in range(len(SIZES))}
    done: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], at: int) -> int:
        count = real(descriptor, buffers, at)
        done.append(starts[at])
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    for index, _ in store.pass_over():
        if index == 0:
            wait_until(lambda: len(done) == 4)
            time.sleep(0.05)  # nothing further may come
            assert sorted(done) == [0, 1, 2, 3]
        if index == 1:
            wait_until(lambda: 4 in done)  # in the buffer of chunk 0, once that is written
    assert sorted(done) == list(range(len(SIZES)))
    store.close()


def test_writes_run_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    gate, real = threading.Event(), os.pwritev

    def pwritev(descriptor: int, buffers: list[memoryview], at: int) -> int:
        assert gate.wait(20)
        return real(descriptor, buffers, at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    for index, (master, _, _) in store.pass_over():
        master += 1
        if index == 2:  # chunks 0 and 1 are still being written
            before = (tmp_path / FILE).read_bytes()
            found = np.frombuffer(before, np.float32, SIZES[0], offset(0, 0))
            np.testing.assert_array_equal(found, chunk(0)[0])
            gate.set()
    np.testing.assert_array_equal(store.read(0)[0], chunk(0)[0] + 1)
    store.close()


def test_the_last_write_of_a_chunk_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    first, real = threading.Event(), os.pwritev

    def pwritev(descriptor: int, buffers: list[memoryview], at: int) -> int:
        if not first.is_set():
            first.set()
            time.sleep(0.1)  # another thread would be before this one
        return real(descriptor, buffers, at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    store.write(1, chunk(1))
    store.write(1, [array * 2 for array in chunk(1)])
    np.testing.assert_array_equal(store.read(1)[0], chunk(1)[0] * 2)
    store.close()


@pytest.mark.parametrize("direct", [None, False])
def test_the_page_cache_keeps_nothing(tmp_path: Path, direct: bool | None) -> None:
    if file_system(tmp_path) == "tmpfs":
        pytest.skip("a file system in memory is all cache")
    store = FileStore(tmp_path, [MIB] * 4, buffers=3, direct=direct)
    path = tmp_path / FILE
    for index in range(4):
        store.write(index, [np.full(MIB, index, np.float32)] * 3)
    store.flush()
    go_over(store)
    assert cached_share(path) < 0.02
    path.read_bytes()
    assert cached_share(path) > 0.9, "the measurement itself"
    go_over(store)
    assert cached_share(path) < 0.02
    store.close()


def test_the_log_says_how(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "jspeed.offload")
    store = filled(tmp_path, direct=False)
    assert not store.direct
    store.close()

    def last() -> str:
        return [message for message in caplog.messages if "reserved" in message][-1]

    assert f"{tmp_path / FILE}: 0.00 GB reserved, no direct I/O: through the page" in last()
    assert "3 buffers of 0.1 MB; checksums " in last()
    monkeypatch.setattr(checksums.importlib, "import_module", missing)
    store = filled(tmp_path)
    assert "checksums CRC-32" in last()
    assert ("reserved, direct I/O;" in last()) == store.direct
    go_over(store)
    store.close()


def test_a_file_system_in_memory_is_named(caplog: pytest.LogCaptureFixture) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or file_system(memory) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm")
    store = FileStore(memory, [10], buffers=3, name=f"test{os.getpid()}")
    store.close()
    assert "on tmpfs, which is host memory. Put nvme_path on a disk." in caplog.text


def test_direct_where_the_file_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_direct(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", no_direct)
    with pytest.raises(
        OffloadError, match=r"no direct I/O \(invalid argument\)\. Put nvme_path on"
    ):
        FileStore(tmp_path, [5], buffers=3, direct=True)
    assert list(tmp_path.iterdir()) == []
    store = filled(tmp_path)
    assert not store.direct
    go_over(store)
    store.close()


def test_direct_io_that_opens_and_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(22, "Invalid")))
    store = FileStore(tmp_path, [5], buffers=3)
    assert not store.direct
    store.close()


def test_two_buffers_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match=r"buffers: 2; expected at least 3: one in use,"):
        FileStore(tmp_path, [5], buffers=2)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def missing(name: str) -> None:
    raise ImportError(name)


def cached_share(path: Path) -> float:
    """The share of a file's pages that the page cache holds (mincore(2))."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = len(mapped) // mmap.PAGESIZE
        held = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        code = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), held
        )
        del first
        assert code == 0, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in held) / pages

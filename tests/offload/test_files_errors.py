"""The disk tier when something breaks: one clear message, and never wrong state."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from jspeed.core.errors import OffloadError
from jspeed.offload import FileStore
from tests.offload.state_files import FILE, PAGE, SIZES, chunk, filled, go_over, offset, overwrite

RESUME = "Resume from the last checkpoint, which is as it was."


def is_torn(store: FileStore, reason: str) -> None:
    """Every later use is refused, with the first reason; then everything can be given up."""
    refused = rf"cannot be used any more: .*{reason}.*\. {re.escape(RESUME)}"
    for use in (
        lambda: go_over(store),
        lambda: store.read(0),
        lambda: store.write(0, chunk(0)),
        store.flush,
    ):
        with pytest.raises(OffloadError, match=refused):
            use()
    store.close()


def fails(name: str, at: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the system call `name` fail at an offset of the file."""
    real = getattr(os, name)

    def call(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == at:
            raise OSError(code, os.strerror(code))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("index", [0, 4, len(SIZES) - 1])
@pytest.mark.parametrize(
    ("call", "code", "doing", "message"),
    [
        ("pwritev", errno.ENOSPC, "written", "the disk is full. Free space, or put nvme_path on"),
        ("pwritev", errno.EDQUOT, "written", "the disk quota is used up"),
        ("pwritev", errno.EIO, "written", "the disk reports a failure"),
        ("preadv", errno.EIO, "read", "the disk reports a failure"),
        ("preadv", errno.ENODEV, "read", "no such device"),
    ],
)
def test_the_disk_fails_within_a_pass(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: int,
    call: str,
    code: int,
    doing: str,
    message: str,
) -> None:
    store = filled(tmp_path)
    go_over(store)
    fails(call, offset(index, 0), code, monkeypatch)
    expected = rf"state\.bin\": chunk {index} cannot be {doing}: {message}"
    with pytest.raises(OffloadError, match=rf"{expected}.*{re.escape(RESUME)}"):
        go_over(store)
    monkeypatch.undo()
    is_torn(store, rf"chunk {index} cannot be {doing}: {message}")
    assert list(tmp_path.iterdir()) == []


def test_the_disk_fails_while_the_state_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path, SIZES, buffers=3)
    fails("pwritev", offset(1, 0), errno.ENOSPC, monkeypatch)
    message = "chunk 1 cannot be written: the disk is full"

    def fill() -> None:
        for index in range(5):
            store.write(index, chunk(index))

    with pytest.raises(OffloadError, match=message):
        fill()
    is_torn(store, message)


def test_a_failed_write_shows_when_the_state_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)
    fails("pwritev", offset(7, 0), errno.EIO, monkeypatch)
    store.write(7, chunk(7))
    with pytest.raises(OffloadError, match="chunk 7 cannot be written"):
        store.read(2)
    is_torn(store, "chunk 7 cannot be written")


@pytest.mark.parametrize("tensor", range(3))
@pytest.mark.parametrize("index", [0, 3, 5])
def test_a_flipped_bit(tmp_path: Path, index: int, tensor: int) -> None:
    store = filled(tmp_path)
    at = offset(index, tensor) + 4 * SIZES[index] - 1
    byte = (tmp_path / FILE).read_bytes()[at]
    overwrite(tmp_path / FILE, at, bytes([byte ^ 16]))
    name = ("master", "mu", "nu")[tensor]
    damaged = rf"{FILE}\": {name} of chunk {index} is damaged: its checksum is [0-9a-f]+; [0-9a-f]+"
    with pytest.raises(OffloadError, match=damaged):
        store.read(index)
    is_torn(store, damaged)
    store = filled(tmp_path, tensors=("a", "b", "c"))
    overwrite(tmp_path / FILE, at, bytes([byte ^ 16]))
    with pytest.raises(OffloadError, match=f"{'abc'[tensor]} of chunk {index} is damaged"):
        go_over(store)
    store.close()


def test_an_old_record_is_damage_too(tmp_path: Path) -> None:
    """What a disk gives back after it lost a write is whole in itself."""
    store = filled(tmp_path)
    old = (tmp_path / FILE).read_bytes()[offset(2, 0) : offset(3, 0)]
    go_over(store)
    overwrite(tmp_path / FILE, offset(2, 0), old)
    with pytest.raises(OffloadError, match="master of chunk 2 is damaged"):
        go_over(store)
    is_torn(store, "master of chunk 2 is damaged")


def test_padding_is_nobodys(tmp_path: Path) -> None:
    store = filled(tmp_path)
    before = [np.copy(tensor) for tensor in store.read(2)]
    overwrite(tmp_path / FILE, offset(2, 0) + 4 * SIZES[2], b"x" * (PAGE - 4 * SIZES[2]))
    for tensor, was in zip(store.read(2), before, strict=True):
        np.testing.assert_array_equal(tensor, was)
    go_over(store)
    store.close()


def test_a_truncated_file_between_passes(tmp_path: Path) -> None:
    store = filled(tmp_path)
    size = (tmp_path / FILE).stat().st_size
    os.truncate(tmp_path / FILE, size - 1)
    message = rf"is truncated: it has {size - 1} bytes; expected {size}"
    with pytest.raises(OffloadError, match=rf"{message}\. {re.escape(RESUME)}"):
        go_over(store)
    is_torn(store, message)


def test_a_file_truncated_within_a_pass(tmp_path: Path) -> None:
    store = filled(tmp_path)

    def visit() -> None:
        for index, _ in store.pass_over():
            if index == 1:
                os.truncate(tmp_path / FILE, offset(6, 1))

    with pytest.raises(OffloadError, match=r"is truncated: it has \d+ bytes"):
        visit()
    is_torn(store, "is truncated")


def test_a_vanished_folder(tmp_path: Path) -> None:
    store = filled(tmp_path)
    shutil.rmtree(tmp_path / FILE.parent)
    with pytest.raises(OffloadError, match=r"state\.bin\" is gone: no such file or directory\."):
        go_over(store)
    is_torn(store, "is gone")


def test_a_folder_that_another_run_took(tmp_path: Path) -> None:
    """Its lock was deleted with it; neither run may harm the other's files."""
    store = filled(tmp_path)
    shutil.rmtree(tmp_path / FILE.parent)
    other = filled(tmp_path)
    with pytest.raises(OffloadError, match="was replaced by another file"):
        store.read(0)
    is_torn(store, "was replaced by another file")
    go_over(other)
    with pytest.raises(OffloadError, match="in use by process"):
        filled(tmp_path)
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    count = 2 * free // 12_000_000
    message = (
        r"cannot be made: the state needs (\d+) bytes \(\d+\.\d\d GB\), (\d+) \(.* GB\) are free: "
        r"the disk is full\. Free space, or put nvme_path on another disk\.$"
    )
    with pytest.raises(OffloadError, match=message) as caught:
        FileStore(tmp_path, [1_000_000] * count, buffers=3)
    found = re.search(message, str(caught.value))
    assert found is not None
    assert int(found[1]) == count * 3 * -(-4_000_000 // PAGE) * PAGE
    assert int(found[2]) == pytest.approx(free, rel=0.2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_what_an_earlier_run_left(tmp_path: Path) -> None:
    killed = (
        "import os, sys, numpy as np\n"
        "from jspeed.offload import FileStore\n"
        "store = FileStore(sys.argv[1], [250_000] * 3, buffers=3, process=7)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", killed, tmp_path], timeout=60)
    assert done.returncode == -9
    running = filled(tmp_path, process=1)
    count = shutil.disk_usage(tmp_path).free // 6_000_000
    with pytest.raises(OffloadError, match="the disk is full") as caught:
        FileStore(tmp_path, [1_000_000] * count, buffers=3)
    left = tmp_path / "jspeed-optimizer-7"
    assert f'An earlier run left "{left}" (0.01 GB), which may be removed.' in str(caught.value)
    assert str(caught.value).count("An earlier run") == 1
    running.close()


def test_the_file_size_limit_of_the_process(tmp_path: Path) -> None:
    limited = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "from jspeed.core.errors import OffloadError\n"
        "from jspeed.offload import FileStore\n"
        "try:\n"
        "    FileStore(sys.argv[1], [100_000], buffers=3)\n"
        "except OffloadError as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert "the state needs 1204224 bytes (0.00 GB), " in done.stdout, done.stderr
    assert "larger than a process may write. Raise the limit (ulimit -f)." in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_buffers_beyond_the_memory_limit_of_the_process(tmp_path: Path) -> None:
    limited = (
        "import resource, sys\n"
        "from jspeed.core.errors import OffloadError\n"
        "from jspeed.offload import FileStore\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (500_000_000, 500_000_000))\n"
        "try:\n"
        "    FileStore(sys.argv[1], [20_000_000], buffers=4)\n"
        "except OffloadError as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("buffers: 4 of 240009216 bytes do not fit"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system(tmp_path: Path) -> None:
    """A real one of 1 MiB, where this process may mount it."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        store = FileStore(place, [20_000] * 4, buffers=3)
        (place / "rest").write_bytes(b"x" * 20_000)
        with pytest.raises(OffloadError, match=r"983040 bytes .* are free: the disk is full"):
            FileStore(place, [20_000] * 4, buffers=3, process=1)
        store.close()
        assert [path.name for path in place.iterdir()] == ["rest"]
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may do everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_one_may_not_write_to(mode: int) -> None:
    message = 'nvme_path ".*": "jspeed-optimizer-0" cannot be made in it: permission was denied'
    # Not in tmp_path, which only its owner may look into.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, mode)
        with ordinary_user(), pytest.raises(OffloadError, match=message):
            FileStore(place, SIZES, buffers=3)
        os.chmod(place, 0o755)


def test_a_folder_of_another_user() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs two users")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777)
        store = filled(Path(place))
        with ordinary_user(), pytest.raises(OffloadError, match="permission was denied"):
            FileStore(place, SIZES, buffers=3)
        go_over(store)
        store.close()


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match=r'nvme_path ".*nvme": there is no such folder\. Mount'):
        FileStore(tmp_path / "nvme", SIZES, buffers=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match=r'nvme_path ".*file" is not a folder\. Name a folder'):
        FileStore(tmp_path / "file", SIZES, buffers=3)
    with pytest.raises(OffloadError, match=r'nvme_path ".*nvme" is not a folder'):
        FileStore(tmp_path / "file" / "nvme", SIZES, buffers=3)

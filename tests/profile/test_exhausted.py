"""Out of memory, in the words of XLA's allocators and compilers."""

from __future__ import annotations

import jax
import pytest

from jspeed.profile.exhausted import Shortage, read_shortage

GIB = 2**30


def shortage(text: str) -> Shortage | None:
    return read_shortage(jax.errors.JaxRuntimeError(text))


# From reports of users of JAX: jax-ml/jax #13428, kingoflolz/mesh-transformer-jax #66,
# patrick-kidger/equinox #737, jax-ml/jax #5733; the last three are XLA:CPU of JAX 0.10.2 and 0.12,
# its allocator on GPUs, and CUDA's own.
@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6291456 bytes.\n"
            "BufferAssignment OOM Debugging.\nBufferAssignment stats:\n"
            "             parameter allocation:    6.00MiB",
            6291456,
        ),
        (
            "Resource exhausted: Failed to allocate request for 32.00MiB (33554432B) on device "
            "ordinal 0",
            33554432,
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 6.27GiB (6727663616B) on device "
            "ordinal 0",
            6727663616,
        ),
        (
            "Resource exhausted: Out of memory while trying to allocate 4398046511104 bytes.: "
            "while running replica 0 and partition 0 of a replicated computation",
            4398046511104,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 3200000000 bytes.", 3200000000),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.50GiB.", int(3.5 * GIB)),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", None),
    ],
)
def test_what_was_asked_for(text: str, asked: int | None) -> None:
    found = shortage(text)
    assert found is not None
    assert (found.asked, found.needed, found.in_compiler) == (asked, None, False)
    assert found.text == text.split("\n")[0]


# The words of XLA's pool of pinned host memory: in 0.10.2's and 0.12's plugins for CUDA.
@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.00GiB. Please set the "
            "environment variable XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB to allocate larger host memory "
            "than the default 64 GB.",
            3 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate 4.0KiB (4096 bytes) of pinned host memory: "
            "CUDA_ERROR_INVALID_VALUE",
            4096,
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate a 8192-byte pinned host staging buffer for a "
            "device-to-host transfer. The pinned host pool may be exhausted or fragmented (see "
            "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB), or the underlying pinned allocation failed.",
            8192,
        ),
        ("INTERNAL: Could not allocate pinned host memory of size: 1024", 1024),
        ("INTERNAL: Could not allocate pinned host memory", None),
    ],
)
def test_pinned_host_memory_is_not_the_devices(text: str, asked: int | None) -> None:
    found = shortage(text)
    assert found is not None
    assert found.on_host
    assert (found.asked, found.needed) == (asked, None)


def test_a_devices_memory_is_not_the_hosts() -> None:
    found = shortage("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.50GiB.")
    assert found is not None
    assert not found.on_host


# LargeWorldModel/LWM #60; jax-ml/jax #27354.
@pytest.mark.parametrize(
    ("text", "needed", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.",
            21.95 * GIB,
            15.48 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: The byte size of input/output arguments (1374526449600) exceeds "
            "the base limit (25554419712). This indicates an error in the calculation!",
            1374526449600,
            25554419712,
        ),
    ],
)
def test_what_the_compiler_refuses(text: str, needed: float, limit: float) -> None:
    found = shortage(text)
    assert found is not None
    assert found.in_compiler
    assert (found.needed, found.limit) == (round(needed), round(limit))


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 458752, available: "
            "232448"
        ),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max"),
        jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with non-zero error code 65280"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6291456 bytes."),
    ],
)
def test_errors_of_another_kind(error: Exception) -> None:
    assert read_shortage(error) is None

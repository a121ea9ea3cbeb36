"""Arrays that are made when their turn comes: one after another, and stored as any others."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.checkpoint import CheckpointStore, Deferred
from jspeed.checkpoint import deferred as deferred_arrays
from jspeed.core.errors import CheckpointError

from .conftest import Arrays, assert_same_bits, make_like, make_mesh

NAMES = ["b/2", "a", "b/10", "z", "empty"]


@pytest.fixture
def arrays() -> Arrays:
    sharding = NamedSharding(make_mesh(8), PartitionSpec("data"))
    made = {name: jnp.arange(n, 64.0 + n).reshape(16, 4) for n, name in enumerate(NAMES[:-1])}
    made["empty"] = jnp.zeros((0, 4))
    return {name: jax.device_put(array, sharding) for name, array in made.items()}


def deferred(array: jax.Array, make: Any = None) -> Deferred:
    return Deferred(array.shape, array.dtype, array.sharding, make or (lambda: array))


def some_deferred(arrays: Arrays) -> dict[str, Any]:
    return {name: a if name == "z" else deferred(a) for name, a in arrays.items()}


def test_what_is_on_disk_is_the_same(tmp_path: Path, arrays: Arrays) -> None:
    store = CheckpointStore(tmp_path)
    store.save("plain", arrays, {}, wait=True)
    store.save("deferred", some_deferred(arrays), {})

    for name in ("_METADATA", "_sharding"):
        plain, other = (
            json.loads((tmp_path / tag / "arrays" / name).read_text())
            for tag in ("plain", "deferred")
        )
        assert plain == other
    assert store.describe("plain") == store.describe("deferred")
    assert_same_bits(store.restore("deferred", like=make_like(arrays, make_mesh(2, 2), {})), arrays)


def test_the_next_is_made_when_the_one_before_it_is_gone(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred_arrays, "GROUP_BYTES", 0)
    alive: list[weakref.ref[jax.Array]] = []
    counts: list[int] = []

    def maker(array: jax.Array) -> Any:
        def make() -> jax.Array:
            counts.append(sum(ref() is not None for ref in alive))
            copy = jnp.copy(array)
            alive.append(weakref.ref(copy))
            return copy

        return make

    given: Any = {name: deferred(array, maker(array)) for name, array in arrays.items()}
    CheckpointStore(tmp_path).save("t", given, {})
    # The frame that made the one before it may still hold it.
    assert counts[0] == 0
    assert len(counts) == len(NAMES) - 1
    assert max(counts) <= 1
    assert (tmp_path / "t" / "jspeed.json").exists(), "on disk when `save` returns"


def test_small_ones_are_made_together(arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves: Any = [(deferred(array), None, None) for array in arrays.values()]
    for limit, counts in ((2**20, [5]), (2 * 256, [2, 3]), (255, [1, 1, 1, 1, 1])):
        monkeypatch.setattr(deferred_arrays, "GROUP_BYTES", limit)
        assert [len(group) for group in deferred_arrays._groups(leaves)] == counts


def test_one_that_cannot_be_made_fails_the_save(tmp_path: Path, arrays: Arrays) -> None:
    def fail() -> jax.Array:
        raise OSError("the disk is gone")

    store = CheckpointStore(tmp_path)
    store.save("first", arrays, {}, wait=True)
    with pytest.raises(CheckpointError, match=r'"second" .* failed: .*the disk is gone'):
        store.save("second", some_deferred(arrays) | {"bad": deferred(arrays["a"], fail)}, {})
    assert (store.latest(), store.tags()) == ("first", ["first"])
    store.save("second", some_deferred(arrays), {})
    assert store.latest() == "second"


def test_restored_when_they_are_made(tmp_path: Path, arrays: Arrays) -> None:
    store = CheckpointStore(tmp_path)
    store.save("t", arrays, {}, wait=True)
    like = make_like(arrays, make_mesh(4), {"a": PartitionSpec("data")})
    found = store.restore("t", like=like, deferred=["a", "empty"])
    late = {name: leaf for name, leaf in found.items() if isinstance(leaf, Deferred)}
    assert set(late) == {"a", "empty"}
    assert list(found) == list(like)
    leaf = late["a"]
    assert (leaf.shape, leaf.dtype, leaf.size, leaf.ndim) == ((16, 4), np.float32, 64, 2)
    assert leaf.make().sharding == like["a"].sharding
    assert_same_bits(found | {name: leaf.make() for name, leaf in late.items()}, arrays)
    for file in (tmp_path / "t" / "arrays").rglob("d/*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r'Checkpoint "t" in .* cannot be read'):
        leaf.make()

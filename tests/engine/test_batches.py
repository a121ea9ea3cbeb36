"""How batches come onto the mesh where a sequence is split."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jspeed.core.errors import DataError, LayoutError
from jspeed.engine.batches import BatchPlacer
from jspeed.layout.data_share import DataShare, data_share
from jspeed.layout.mesh import make_mesh, resolve_mesh
from jspeed.layout.zero import Layout


def layout(*, seq: int, data: int = 1) -> Layout:
    shape = resolve_mesh(devices=seq * data, seq=seq, data=data)
    mesh = make_mesh(shape, jax.devices()[: shape.devices])
    return Layout(mesh, 0, {}, "float32", "float32")


def test_each_device_gets_its_rows_and_its_part_of_the_sequence():
    tokens = np.arange(8 * 12, dtype=np.int32).reshape(8, 12)
    batch = {"input_ids": tokens, "weight": np.ones((8, 1)), "row": np.arange(8)}
    placed = BatchPlacer(layout(seq=2, data=2), rows=8, accumulation=2)(batch)
    assert placed["input_ids"].shape == (2, 4, 12)
    np.testing.assert_array_equal(placed["input_ids"].reshape(8, 12), tokens)
    shapes = {name: leaf.addressable_shards[0].data.shape for name, leaf in placed.items()}
    assert shapes == {"input_ids": (2, 2, 6), "weight": (2, 2, 1), "row": (2, 2)}


@pytest.mark.parametrize(("length", "near"), [(10, "8 or 12"), (3, "4")])
def test_a_sequence_that_does_not_divide_is_an_error(length, near):
    placer = BatchPlacer(layout(seq=4), rows=2, accumulation=1)
    with pytest.raises(DataError) as error:
        placer({"labels": np.zeros((2, length), np.int32)})
    assert str(error.value) == (
        f"batch['labels'] has shape [2, {length}]; \"mesh.seq\": 4 splits its second dimension, "
        f"the sequence, and does not divide {length}. Use sequences of {near} tokens "
        '("data.sequence_length" in a run file).'
    )


class Device:
    """A device of a process, for meshes that are only looked at."""

    def __init__(self, process: int) -> None:
        self.process_index = process


def share(process: int, owners: list[int], **sizes: int):
    devices = [Device(owner) for owner in owners]
    return data_share(make_mesh(resolve_mesh(devices=len(owners), **sizes), devices), process)


def test_each_process_reads_the_rows_of_its_batch_shards():
    assert share(1, [0, 0, 1, 1]) == DataShare(1, 2, (2, 3))


@pytest.mark.parametrize("process", [0, 1])
def test_stages_of_one_batch_shard_read_the_same_rows(process):
    assert share(process, [0, 0, 1, 1], pipe=2) == DataShare(0, 1, (0, 1))
    assert share(process, [0, 1], data=1, seq=2) == DataShare(0, 1, (0,))
    assert share(process, [0, 1, 0, 1], pipe=2) == DataShare(process, 2, (process,))


def test_processes_that_share_a_part_of_their_shards_are_refused():
    with pytest.raises(LayoutError) as error:
        share(0, [0, 0, 0, 1, 1, 1], data=3, tensor=2)
    assert str(error.value).startswith(
        '"mesh": data 3 x tensor 2 over 2 processes: some processes share a part of their batch '
        "shards, so that they would read examples in part alike."
    )

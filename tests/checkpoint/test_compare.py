"""What a run expects and a checkpoint does not hold is listed, with the shapes of both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jspeed.checkpoint import CheckpointStore
from jspeed.core.errors import CheckpointError

from .conftest import Like, message


def test_arrays_that_do_not_fit(store: CheckpointStore, like: Like) -> None:
    other = dict(like)
    other["new"] = jax.ShapeDtypeStruct((4,), jnp.float16)
    del other["step"]
    other["master/bias"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    other["master/blocks/kernel"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
    assert message(store, other) == (
        'Checkpoint "global_step200" does not fit this run. '
        '1 array not in the checkpoint: "new" float16[4]. '
        '1 array only in the checkpoint: "step" int32[]. '
        '1 array of another shape: "master/blocks/kernel" is (16, 8) in the checkpoint and '
        "(16, 9) here. "
        '1 array of another dtype: "master/bias" is bfloat16 in the checkpoint and float32 here. '
        "Restore it with the model and optimizer that saved it, or name only the arrays to load."
    )


def test_subset_allows_fewer_but_not_more(store: CheckpointStore, like: Like) -> None:
    only = {"step": like["step"]}
    assert "2 arrays only in the checkpoint" in message(store, only)
    assert int(store.restore(like=only, subset=True)["step"]) == 7
    more = {f"more/{i}": like["step"] for i in range(13)}
    with pytest.raises(CheckpointError) as caught:
        store.restore(like={**only, **more}, subset=True)
    text = str(caught.value)
    assert "13 arrays not in the checkpoint: " in text
    assert text.count("more/") == 10
    assert "; and 3 more." in text

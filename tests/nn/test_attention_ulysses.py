"""How heads are dealt out to devices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.nn.attention_ulysses import HeadPlan


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (8, 8), (8, 2), (12, 3), (9, 3), (32, 8), (7, 1)]
)
def test_every_head_meets_its_own_keys_on_one_device(heads, kv_heads, devices):
    plan = HeadPlan(devices, heads, kv_heads)
    numbers = np.arange(1, heads + 1, dtype=np.float32).reshape(1, 1, heads, 1)
    of_keys = np.arange(1, kv_heads + 1, dtype=np.float32).reshape(1, 1, kv_heads, 1)
    queries = plan.deal_queries(jnp.asarray(numbers))
    keys = plan.deal_keys(jnp.asarray(of_keys))
    assert queries.shape == (1, 1, devices, plan.places, 1)
    assert keys.shape == (1, 1, devices, plan.units, 1)
    on_device = zip(np.asarray(queries)[0, 0, ..., 0], np.asarray(keys)[0, 0, ..., 0], strict=True)
    for own, meets in on_device:
        for place, head in enumerate(own):
            if head:  # 0 fills up
                expected = (head - 1) // (heads // kv_heads) + 1
                assert meets[place // (plan.places // plan.units)] == expected
    dealt = np.asarray(queries).ravel()
    assert sorted(dealt[dealt > 0]) == list(range(1, heads + 1))
    np.testing.assert_array_equal(plan.collect(queries), numbers)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "places", "units"),
    [
        (32, 8, 8, 4, 1),  # Llama 3 8B on a host: nothing is copied
        (32, 8, 16, 2, 1),  # two devices share a key head
        (32, 8, 4, 8, 2),
        (3, 3, 2, 2, 2),  # one head of four is filling
        (12, 3, 8, 2, 1),  # two devices for each group of four, two idle
    ],
)
def test_how_much_each_device_gets(heads, kv_heads, devices, places, units):
    plan = HeadPlan(devices, heads, kv_heads)
    assert (plan.places, plan.units) == (places, units)

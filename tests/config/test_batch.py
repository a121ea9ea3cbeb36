"""jspeed/config/batch.py: the triangle, its arithmetic and its error messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jspeed.config import Batch, load_config, resolve_batch
from jspeed.core.errors import ConfigError

NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def config_of(train=None, micro=None, steps=None, **more):
    sizes = zip(NAMES, (train, micro, steps), strict=True)
    return load_config({**{name: size for name, size in sizes if size is not None}, **more})


def error_of(devices, *sizes) -> str:
    with pytest.raises(ConfigError) as error:
        resolve_batch(config_of(*sizes), devices)
    return str(error.value)


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((32, 2, 2), 8, (32, 2, 2)),
        ((32, 2, None), 8, (32, 2, 2)),
        ((32, None, 4), 4, (32, 2, 4)),
        ((None, 2, 4), 4, (32, 2, 4)),
        ((32, None, None), 8, (32, 4, 1)),
        ((None, 4, None), 8, (32, 4, 1)),
    ],
)
def test_every_row_of_the_triangle(sizes, devices, expected):
    assert resolve_batch(config_of(*sizes), devices) == Batch(*expected)


def test_another_device_count_changes_the_accumulation_only():
    config = config_of(32, 2)
    batches = [resolve_batch(config, devices) for devices in (1, 2, 4, 8, 16)]
    assert {batch.train_batch_size for batch in batches} == {32}
    assert {batch.micro_batch_size for batch in batches} == {2}
    assert [batch.accumulation for batch in batches] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("devices", "sizes", "message"),
    [
        (
            8, (48, 4, None),
            '"train_batch_size": 48 is not divisible by micro batch 4 x 8 data-parallel devices = '
            '32 (remainder 16). The nearest that hold: "train_batch_size" 32 or 64, or '
            '"train_micro_batch_size_per_gpu" 3 or 6.',
        ),
        (
            8, (30, None, None),
            '"train_batch_size": 30 is not divisible by accumulation 1 x 8 data-parallel devices '
            '= 8 (remainder 6). The nearest that hold: "train_batch_size" 24 or 32.',
        ),
        (
            4, (24, None, 4),
            '"train_batch_size": 24 is not divisible by accumulation 4 x 4 data-parallel devices '
            '= 16 (remainder 8). The nearest that hold: "train_batch_size" 16 or 32, or '
            '"gradient_accumulation_steps" 3 or 6.',
        ),
        (
            4, (32, 2, 2),
            '"train_batch_size": 32 is not micro batch 2 x accumulation 2 x 4 data-parallel '
            'devices = 16. These hold: "train_batch_size" 16, or "gradient_accumulation_steps" 4, '
            'or "train_micro_batch_size_per_gpu" 4; or leave out "gradient_accumulation_steps" to '
            "have it computed.",
        ),
        (
            8, (4, None, None),
            '"train_batch_size": 4 is not divisible by accumulation 1 x 8 data-parallel devices '
            '= 8 (remainder 4). The nearest that hold: "train_batch_size" 8.',
        ),
        (0, (4, None, None), '"train_batch_size": cannot be split over 0 data-parallel devices.'),
    ],
)  # fmt: skip
def test_messages_show_the_arithmetic_and_what_holds(devices, sizes, message):
    assert error_of(devices, *sizes) == message


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), '"train_batch_size": missing; set it, or "train_micro_batch_size_per_gpu", or both.'),
        ((None, None, 2),
         '"train_batch_size": missing; set it, or "train_micro_batch_size_per_gpu", or both.'),
        ((33, 2), '"train_batch_size": 33 is not divisible by micro batch 2, on any number of '
                  'devices (remainder 1). The nearest that hold: "train_batch_size" 32 or 34, or '
                  '"train_micro_batch_size_per_gpu" 1 or 3.'),
        ((32, 3, 4), '"train_batch_size": 32 is not divisible by 12, on any number of devices '
                     '(remainder 8). The nearest that hold: "train_batch_size" 24 or 36.'),
    ],
)  # fmt: skip
def test_what_fails_on_every_device_count_fails_at_loading(sizes, message):
    with pytest.raises(ConfigError) as error:
        config_of(*sizes)
    assert str(error.value) == message


def test_a_mesh_that_fixes_the_devices_is_checked_at_loading():
    with pytest.raises(ConfigError, match="8 data-parallel devices = 16"):
        config_of(40, 2, mesh={"data": 8})
    with pytest.raises(ConfigError, match="8 data-parallel devices = 16"):
        config_of(40, 2, mesh={"data": 2, "replica": 2, "expert": 2, "tensor": 4})
    assert config_of(40, 2).batch.train_batch_size == 40


def test_huge_sizes_answer_at_once():
    with pytest.raises(ConfigError, match="is not divisible"):
        config_of(2**62 + 1, 2**61)


_SIZE = st.integers(1, 64) | st.none()


@given(st.integers(1, 4096) | st.none(), _SIZE, _SIZE, st.integers(1, 32))
def test_a_batch_always_holds_and_keeps_what_was_given(train, micro, steps, devices):
    part = (micro or 1) * (steps or 1) * devices
    if train is None:
        possible = micro is not None
    else:
        possible = train == part if micro and steps else train % part == 0
    if not possible:
        with pytest.raises(ConfigError, match=r'^"train_batch_size": '):
            resolve_batch(config_of(train, micro, steps), devices)
        return
    batch = resolve_batch(config_of(train, micro, steps), devices)
    assert batch.train_batch_size == batch.micro_batch_size * batch.accumulation * devices
    assert train in (None, batch.train_batch_size)
    assert micro in (None, batch.micro_batch_size)
    assert steps in (None, batch.accumulation)

"""The batch triangle: global batch = micro batch x accumulation x data-parallel devices."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jspeed.config.elastic_batch import ElasticBatch, choose
from jspeed.config.problem import Problem, config_error
from jspeed.config.sections import BatchConfig

if TYPE_CHECKING:
    from jspeed.config.config import Config

TRAIN, MICRO, ACCUMULATION = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)

_FAR = 10_000


@dataclass(frozen=True, slots=True)
class Batch:
    """Batch sizes that hold together.

    `train_batch_size = micro_batch_size * accumulation * data_parallel_size`.
    """

    train_batch_size: int
    micro_batch_size: int
    accumulation: int


def resolve_batch(config: "Config", data_parallel_size: int) -> Batch:
    """Return the batch sizes on a number of data-parallel devices.

    Two sizes determine the third; `train_batch_size` alone means no accumulation, and so does
    the micro batch alone. With `train_batch_size` and the micro batch given, another number of
    devices changes the accumulation and leaves the training as it is. Where `elasticity` is on, it
    chooses the batch, and the largest of its microbatches that divides a device's share.

    Args:
        config: the configuration whose batch keys count.
        data_parallel_size: devices over which the batch is split (replica x data x expert).

    Raises:
        ConfigError: the sizes do not hold together; the text shows the arithmetic and the
            nearest values that do.
    """
    if config.elasticity is None:
        outcome = complete(config.batch, data_parallel_size)
    else:
        outcome = elastic(choose(config.elasticity), data_parallel_size)
    if isinstance(outcome, Problem):
        raise config_error([outcome])
    return outcome


def complete(batch: BatchConfig, devices: int) -> Batch | Problem:
    """Return the completed batch sizes, or what is wrong with them."""
    train, micro, steps = (
        batch.train_batch_size,
        batch.micro_batch_size,
        batch.gradient_accumulation_steps,
    )
    if devices < 1:
        return Problem(TRAIN, f"cannot be split over {devices} data-parallel devices.")
    if train is None and micro is None:
        return missing()
    if train is None:
        assert micro is not None
        steps = steps or 1
        return Batch(micro * steps * devices, micro, steps)
    if micro is not None and steps is not None:
        return _all_three(train, micro, steps, devices)
    if micro is not None:
        return _divide(train, micro, MICRO, devices)
    return _divide(train, steps or 1, ACCUMULATION, devices)


def elastic(chosen: ElasticBatch | Problem, devices: int) -> Batch | Problem:
    """Return the sizes of an elastic batch on so many devices, or why it does not hold there."""
    if isinstance(chosen, Problem):
        return chosen
    micro = chosen.micro_batch_size(devices)
    if isinstance(micro, Problem):
        return micro
    train = chosen.train_batch_size
    return Batch(train, micro, train // (micro * devices))


def missing() -> Problem:
    """Return the problem of a configuration without batch sizes."""
    return Problem(TRAIN, f'missing; set it, or "{MICRO}", or both.', lacks=(TRAIN, MICRO))


def _all_three(train: int, micro: int, steps: int, devices: int) -> Batch | Problem:
    product = micro * steps * devices
    if product == train:
        return Batch(train, micro, steps)
    options = [f'"{TRAIN}" {product}']
    if train % (micro * devices) == 0:
        options.append(f'"{ACCUMULATION}" {train // (micro * devices)}')
    if train % (steps * devices) == 0:
        options.append(f'"{MICRO}" {train // (steps * devices)}')
    return Problem(
        TRAIN,
        f"{train} is not micro batch {micro} x accumulation {steps} x {_devices(devices)} = "
        f"{product}. These hold: {', or '.join(options)}; or leave out "
        f'"{ACCUMULATION}" to have it computed.',
    )


def _divide(train: int, given: int, name: str, devices: int) -> Batch | Problem:
    """Solve the triangle for the size that is neither `train` nor the one called `name`."""
    part = given * devices
    if train % part == 0:
        rest = train // part
        micro, steps = (given, rest) if name == MICRO else (rest, given)
        return Batch(train, micro, steps)
    return _indivisible(train, given, name, devices)


def _indivisible(train: int, given: int, name: str, devices: int | None) -> Problem:
    """The problem that `train` is no multiple of `given` on so many (None: any) devices."""
    part = given * (devices or 1)
    word = {MICRO: "micro batch ", ACCUMULATION: "accumulation "}.get(name, "")
    factors = f"{word}{given}"
    if devices is None:
        factors += ", on any number of devices"
    else:
        factors += f" x {_devices(devices)} = {part}"
    below = train // part * part
    near = [_either(TRAIN, [value for value in (below, below + part) if value > 0])]
    share, uneven = divmod(train, devices or 1)
    divisors = [] if uneven or not word else _divisors_next_to(given, share)
    if divisors:
        near.append(_either(name, divisors))
    return Problem(
        TRAIN,
        f"{train} is not divisible by {factors} (remainder {train % part}). "
        f"The nearest that hold: {', or '.join(near)}.",
    )


def _devices(count: int) -> str:
    return f"{count} data-parallel device{'' if count == 1 else 's'}"


def _either(name: str, values: list[int]) -> str:
    return f'"{name}" {" or ".join(map(str, values))}'


def _divisors_next_to(given: int, number: int) -> list[int]:
    """The divisors of `number` next to `given`, below and above, if they are not far."""
    below = range(given - 1, max(0, given - _FAR), -1)
    above = range(given + 1, min(number, given + _FAR) + 1)
    found = (next((n for n in side if number % n == 0), None) for side in (below, above))
    return [value for value in found if value is not None]


def check(batch: BatchConfig, devices: int | None) -> Problem | None:
    """Return what is wrong with the sizes, as far as it can be known.

    Args:
        batch: the sizes as written.
        devices: the data-parallel size where the mesh fixes it, else None: then only what
            fails on every number of devices is found.
    """
    if devices is not None:
        outcome = complete(batch, devices)
        return outcome if isinstance(outcome, Problem) else None
    train, micro, steps = (
        batch.train_batch_size,
        batch.micro_batch_size,
        batch.gradient_accumulation_steps,
    )
    if train is None:
        return missing() if micro is None else None
    if micro is not None and steps is not None and train % (micro * steps):
        return _indivisible(train, micro * steps, f"{MICRO} x {ACCUMULATION}", None)
    for name, given in ((MICRO, micro), (ACCUMULATION, steps)):
        if given is not None and train % given:
            return _indivisible(train, given, name, None)
    return None

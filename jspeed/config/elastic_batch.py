"""A batch size that many numbers of devices divide: the arithmetic of the `elasticity` section.

A run whose global batch stays the same on another number of devices keeps its loss curve. So a
batch size is chosen that as many numbers of devices as possible share out evenly, in microbatches
of the sizes that were named; what a number of devices changes is the accumulation.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jspeed.config.problem import Problem
from jspeed.config.sections import ElasticityConfig

SECTION = "elasticity"
VERSIONS = (0.1, 0.2)
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class ElasticBatch:
    """The batch size that `elasticity` chose, and the numbers of devices it holds on.

    Attributes:
        train_batch_size: rows of one optimizer step, whatever the number of devices.
        micro_batch_sizes: those that a device may take at a time, ascending.
        data_parallel_sizes: numbers of data-parallel devices that share the batch evenly,
            ascending.
        model_parallel_size: devices that hold one copy of the model together.
    """

    train_batch_size: int
    micro_batch_sizes: tuple[int, ...]
    data_parallel_sizes: tuple[int, ...]
    model_parallel_size: int = 1

    @property
    def gpu_counts(self) -> tuple[int, ...]:
        """The numbers of devices in all, ascending."""
        return tuple(size * self.model_parallel_size for size in self.data_parallel_sizes)

    def micro_batch_size(self, data_parallel_size: int) -> int | Problem:
        """The largest microbatch that divides a device's share, or why there is none.

        Args:
            data_parallel_size: devices over which the batch is split.
        """
        if data_parallel_size not in self.data_parallel_sizes:
            return self.unfit(data_parallel_size * self.model_parallel_size)
        share = self.train_batch_size // data_parallel_size
        return max(size for size in self.micro_batch_sizes if share % size == 0)

    def unfit(self, gpus: int) -> Problem:
        """The problem that so many devices in all do not share the batch evenly."""
        copy = self.model_parallel_size
        each = f" ({copy} for each copy of the model)" if copy > 1 else ""
        return Problem(
            SECTION,
            f"{gpus} device{'' if gpus == 1 else 's'}{each} cannot share the batch of "
            f"{self.train_batch_size} rows that it chose. Start one of these numbers: "
            f"{_listed(self.gpu_counts, gpus)}.",
        )


def _listed(counts: tuple[int, ...], near: int) -> str:
    """The counts; of very many those next to one."""
    if len(counts) <= _SHOWN:
        return ", ".join(map(str, counts))
    half = _SHOWN // 2
    below = [count for count in counts if count < near][-half:]
    above = [count for count in counts if count > near][:half]
    return f"{', '.join(map(str, below + above))} (the nearest of {len(counts)})"


def choose(section: ElasticityConfig) -> ElasticBatch | Problem:
    """Return the batch size that the most numbers of devices divide, or what is wrong.

    Version 0.1 counts devices. Version 0.2 counts whole nodes, each of which holds
    `num_gpus_per_node // model_parallel_size` copies of the model.
    """
    copies = 1
    if section.version == 0.2:
        if section.num_gpus_per_node % section.model_parallel_size:
            return Problem(
                f"{SECTION}.num_gpus_per_node",
                f'{section.num_gpus_per_node} is not divisible by "{SECTION}.model_parallel_size" '
                f"{section.model_parallel_size}: a copy of the model does not cross nodes.",
            )
        copies = section.num_gpus_per_node // section.model_parallel_size
    problem = _too_large(section, copies)
    if problem is not None:
        return problem
    micro = sorted(set(section.micro_batch_sizes))
    units = _units(section)
    found = {
        size: counts
        for size in _candidates(micro, section.max_train_batch_size // copies)
        if (counts := _divisors_in(size, micro, units))
    }
    if not found:
        return _none_in_range(section)
    sign = 1 if section.prefer_larger_batch else -1
    size = max(found, key=lambda size: (len(found[size]), sign * size))
    return ElasticBatch(
        size * copies,
        tuple(micro),
        tuple(count * copies for count in sorted(found[size])),
        section.model_parallel_size,
    )


def _units(section: ElasticityConfig) -> range:
    """The numbers of devices, or of whole nodes, that lie between the least and the most."""
    per_unit = section.num_gpus_per_node if section.version == 0.2 else 1
    return range(-(-section.min_gpus // per_unit), section.max_gpus // per_unit + 1)


def _too_large(section: ElasticityConfig, copies: int) -> Problem | None:
    largest, most = max(section.micro_batch_sizes), section.max_train_batch_size
    if largest * copies <= most:
        return None
    node = f" on each of a node's {copies} copies of the model" if copies > 1 else ""
    return Problem(
        f"{SECTION}.micro_batch_sizes",
        f'{largest}{node} is more than "{SECTION}.max_train_batch_size" {most}. Use smaller '
        f"microbatches, or at least {largest * copies} for the most.",
    )


def _none_in_range(section: ElasticityConfig) -> Problem:
    nodes = section.version == 0.2 and section.num_gpus_per_node > 1
    whole = f" in whole nodes of {section.num_gpus_per_node}" if nodes else ""
    return Problem(
        f"{SECTION}.min_gpus",
        f"no batch of at most {section.max_train_batch_size} rows can be shared by "
        f"{section.min_gpus} to {section.max_gpus} devices{whole} in microbatches of "
        f"{', '.join(map(str, section.micro_batch_sizes))}. Widen the range, or raise "
        f'"{SECTION}.max_train_batch_size".',
    )


def _candidates(micro: Iterable[int], most: int) -> set[int]:
    """For every microbatch, and for their least common multiple: the multiple, at most `most`,
    whose factor has more divisors than any smaller number."""
    bases = [*micro, math.lcm(*micro)]
    return {base * highly_composite(most // base) for base in bases if base <= most}


def _divisors_in(size: int, micro: Iterable[int], allowed: range) -> set[int]:
    """The allowed counts that share a batch evenly, each in whole microbatches of one size."""
    return {
        count for rows in micro if size % rows == 0 for count in _divisors(size // rows, allowed)
    }


def _divisors(number: int, allowed: range) -> Iterator[int]:
    """The divisors of a number that are allowed, by the shorter way to them."""
    root = math.isqrt(number)
    if root > len(allowed):
        yield from (count for count in allowed if number % count == 0)
        return
    for low in range(1, root + 1):
        if number % low == 0:
            yield from (count for count in (low, number // low) if count in allowed)


def highly_composite(limit: int) -> int:
    """Return the largest number up to `limit` that has more divisors than every smaller one.

    Such numbers are products of the first primes, with exponents that do not increase (Ramanujan,
    "Highly composite numbers", 1915).

    Args:
        limit: at least 1.
    """
    best, most = 1, 0
    for number, divisors in sorted(_products(limit, _PRIMES, limit)):
        if divisors > most:
            best, most = number, divisors
    return best


_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
"""Their product is beyond 2**63, so no limit that a file can hold needs another."""


def _products(limit: int, primes: tuple[int, ...], exponent: int) -> Iterator[tuple[int, int]]:
    """Products of powers of `primes` up to `limit`, with their numbers of divisors."""
    yield 1, 1
    power = 1
    for own in range(1, exponent + 1 if primes else 1):
        power *= primes[0]
        if power > limit:
            return
        for number, divisors in _products(limit // power, primes[1:], own):
            yield power * number, (own + 1) * divisors

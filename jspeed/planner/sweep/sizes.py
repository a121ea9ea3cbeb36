"""Which sizes of mesh axes and microbatches a sweep tries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jspeed.config import Config, SweepConfig


def sequence_length(config: Config) -> int:
    """Tokens of a row."""
    model, data = config.model, config.data
    assert model is not None
    return data.sequence_length if data else model.sequence_length


def axis_sizes(config: Config, gpus: int, gpus_per_host: int) -> dict[str, list[int]]:
    """The sizes to try of every axis but `data`, which takes what remains."""
    return {
        "pipe": _pipe_sizes(config, gpus),
        "replica": _replica_sizes(config, gpus, gpus_per_host),
        "seq": _seq_sizes(config, gpus, gpus_per_host),
        "tensor": _tensor_sizes(config, gpus, gpus_per_host),
    }


def uncut_by_tensor(config: Config) -> dict[str, int]:
    """What `tensor` never cuts, unless rules by hand say what it cuts."""
    assert config.model is not None
    return {} if splits_tensor(config) else {"heads": config.model.heads}


def varies(sweep: SweepConfig, axis: str) -> bool:
    """Whether a sweep tries other sizes of an axis than the run's."""
    return sweep.axes is None or axis in sweep.axes


def varies_pipe(sweep: SweepConfig) -> bool:
    """The same of `pipe`, which has to be asked for."""
    return sweep.pipe is not None or (sweep.axes is not None and "pipe" in sweep.axes)


def _pipe_sizes(config: Config, gpus: int) -> list[int]:
    sweep = config.sweep
    assert config.model is not None
    if sweep.pipe is not None:
        return sorted(set(sweep.pipe))
    if not varies_pipe(sweep):
        return [config.mesh.pipe]
    return [size for size in divisors(gpus) if size <= config.model.layers]


def _seq_sizes(config: Config, gpus: int, gpus_per_host: int) -> list[int]:
    sweep = config.sweep
    if sweep.seq is not None:
        return sorted(set(sweep.seq))
    if sweep.axes is None or "seq" not in sweep.axes:
        return [config.mesh.seq]
    return divisors(min(gpus, gpus_per_host))


def _replica_sizes(config: Config, gpus: int, gpus_per_host: int) -> list[int]:
    sweep, shard = config.sweep, config.zero.mics_shard_size
    own = config.mesh.replica
    if shard > 0:  # MiCS: groups of so many, copied between groups
        own = max(1, gpus // (config.mesh.pipe * config.mesh.seq * config.mesh.tensor * shard))
    if sweep.replica is not None:
        return sorted(set(sweep.replica))
    if not varies(sweep, "replica"):
        return [own]
    if sweep.axes is not None:
        return divisors(gpus)
    hosts = gpus // min(gpus, gpus_per_host)
    return sorted({1, own, hosts})


def _tensor_sizes(config: Config, gpus: int, gpus_per_host: int) -> list[int]:
    sweep = config.sweep
    if sweep.tensor is not None:
        return sorted(set(sweep.tensor))
    if not varies(sweep, "tensor"):
        return [config.mesh.tensor]
    if not splits_tensor(config) and sweep.axes is None:
        return [config.mesh.tensor]
    return divisors(min(gpus, gpus_per_host))


def splits_tensor(config: Config) -> bool:
    """Whether a sharding rule splits a parameter over the `tensor` axis."""
    return any("tensor" in axes for _, axes in config.mesh.rules)


def micro_batch_sizes(sweep: SweepConfig, rows: int) -> list[int]:
    """The microbatches to try where a device has so many rows of a step."""
    if sweep.micro_batch_sizes is not None:
        return sorted(set(sweep.micro_batch_sizes))
    least, most = sweep.min_micro_batch_size, min(rows, sweep.max_micro_batch_size or rows)
    powers = [size for size in _powers_of_two(most) if size >= least]
    return _evenly(powers, sweep.micro_batch_count)


def _powers_of_two(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def _evenly(sizes: Sequence[int], count: int | None) -> list[int]:
    """So many of them, the first and the last included where there are two."""
    if count is None or count >= len(sizes):
        return list(sizes)
    if count == 1:
        return [sizes[-1]]
    step = (len(sizes) - 1) / (count - 1)
    return [sizes[round(turn * step)] for turn in range(count)]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]

"""What must hold between keys: one small function per rule, each yielding the problems it finds."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from jspeed.config import elastic_rules, patterns, remat_rules
from jspeed.config.batch import ACCUMULATION, MICRO, TRAIN, check
from jspeed.config.build import BYTE_VOCABULARY
from jspeed.config.key import REFUSED
from jspeed.config.model_rules import model
from jspeed.config.problem import Problem, shown
from jspeed.config.sections import BatchConfig
from jspeed.config.values import Values

Rule = Callable[[Values], Iterator[Problem]]
_ZERO = "zero_optimization"


def refused_features(values: Values) -> Iterator[Problem]:
    """A refused key may stand at its default, but not ask for its feature."""
    for path, entry in values.given.items():
        key = entry.key
        if key.treatment is REFUSED and not entry.pending and key.switches_on(entry.value):
            yield Problem(path, f"{shown(entry.value)} is refused: {key.reason}.", entry.line)


def one_precision(values: Values) -> Iterator[Problem]:
    """fp16 and bf16 exclude each other, and `param_dtype` must agree with them."""
    fp16, bf16 = values.get("fp16.enabled"), values.get("bf16.enabled")
    if fp16 and bf16:
        yield Problem(
            "fp16.enabled",
            'true while "bf16.enabled" is true; only one can be. Set one of them to false.',
            values.line("fp16.enabled"),
        )
        return
    mode = "fp16" if fp16 else "bf16" if bf16 else "fp32"
    for name in ("param_dtype", "grad_accum_dtype"):
        path = f"data_types.{name}"
        dtype = values.get(path)
        fine = (mode,) if name == "param_dtype" else (mode, "fp32")
        if dtype is not None and dtype not in fine:
            yield Problem(
                path,
                f'"{dtype}" does not agree with the compute dtype {mode} that fp16/bf16 set; '
                f"expected {' or '.join(dict.fromkeys(fine))}, or leave it out.",
                values.line(path),
            )


def loss_scale(values: Values) -> Iterator[Problem]:
    """Dynamic loss scaling needs a window and a floor; unused values are not judged."""
    if not values.get("fp16.enabled") or values.get("fp16.loss_scale") != 0:
        return
    for name in ("loss_scale_window", "min_loss_scale"):
        path = f"fp16.{name}"
        if values.get(path) <= 0:
            yield Problem(
                path,
                f"{shown(values.get(path))} must be above 0 with dynamic loss scaling "
                '("fp16.loss_scale": 0).',
                values.line(path),
            )


def half_master(values: Values) -> Iterator[Problem]:
    """16-bit master weights belong to ZeRO, and 16-bit moments to 16-bit master weights."""
    stage = values.get(f"{_ZERO}.stage")
    for path in ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"):
        if values.get(path) and stage == 0:
            yield Problem(path, f'true needs "{_ZERO}.stage" 1, 2 or 3.', values.line(path))
    path = "bf16.bf16_optimizer_states"
    if values.get(path) and not values.get("bf16.bf16_master_weights_and_grads"):
        yield Problem(
            path, 'true needs "bf16.bf16_master_weights_and_grads": true.', values.line(path)
        )


def summed_gradients(values: Values) -> Iterator[Problem]:
    """Gradients are averaged in the modes that reduce them inside the backward pass."""
    path = "gradient_allreduce_op"
    if values.get(path) != "sum":
        return
    clashes = {
        f'"{_ZERO}.stage": 3': values.get(f"{_ZERO}.stage") == 3,
        f'"{_ZERO}.zenflow"': values.is_given(f"{_ZERO}.zenflow"),
        '"compile.deepcompile": true': values.get("compile.deepcompile"),
    }
    for other, clash in clashes.items():
        if clash:
            yield Problem(path, f'"sum" does not go with {other}; use "mean".', values.line(path))


def offload(values: Values) -> Iterator[Problem]:
    """NVMe needs a path, buffers and an update on the host."""
    section = f"{_ZERO}.offload_optimizer"
    yield from _disk(values, section, 3, "one in use, one being read, one being written")
    yield from _disk(values, f"{_ZERO}.offload_param", 2, "one layer in use, one being read")
    update = f"{section}.update"
    if values.get(f"{section}.device") == "nvme" and values.get(update) == "device":
        yield Problem(
            update,
            '"device" does not go with "device": "nvme": devices stream state from pinned memory. '
            'Use "host", or "device": "cpu".',
            values.line(update),
        )


def _disk(values: Values, section: str, fewest: int, why: str) -> Iterator[Problem]:
    if values.get(f"{section}.device") != "nvme":
        return
    if not values.get(f"{section}.nvme_path"):
        yield Problem(
            f"{section}.nvme_path",
            f'missing; "{section}.device": "nvme" needs a folder on the disk.',
        )
    buffers = f"{section}.buffer_count"
    if values.get(buffers) < fewest:
        yield Problem(
            buffers,
            f"{values.get(buffers)}; expected at least {fewest}: {why}.",
            values.line(buffers),
        )


def optimizer(values: Values) -> Iterator[Problem]:
    """Parameters of an optimizer that exclude each other."""
    kind = values.get("optimizer.type")
    params = "optimizer.params"
    mode = values.given.get(f"{params}.adam_w_mode")
    if kind == "AdamW" and mode is not None and mode.value is False:
        yield Problem(
            f"{params}.adam_w_mode",
            'false contradicts "type": "AdamW"; for L2 regularisation write "type": "Adam".',
            mode.line,
        )
    if kind == "SGD" and values.get(f"{params}.nesterov"):
        momentum = values.given.get(f"{params}.momentum")
        dampening = values.given.get(f"{params}.dampening")
        if momentum is None or not momentum.value or (dampening and dampening.value):
            yield Problem(
                f"{params}.nesterov",
                "true needs a momentum above 0 and no dampening.",
                values.line(f"{params}.nesterov"),
            )


def mesh(values: Values) -> Iterator[Problem]:
    """`data` is a size or -1, and MiCS divides it into whole groups."""
    size = values.get("mesh.data")
    if size == 0:
        yield Problem(
            "mesh.data",
            "0 is not a number of devices; expected at least 1, or -1 for all that remain.",
            values.line("mesh.data"),
        )
    path = f"{_ZERO}.mics_shard_size"
    shard = values.get(path)
    if shard == 0:
        yield Problem(path, "0 is not a number of devices; -1 is off.", values.line(path))
    elif shard > 0 and size > 0 and size % shard:
        yield Problem(
            path,
            f'{shard} does not divide "mesh.data": {size} (remainder {size % shard}) into groups '
            "that each hold one set of shards.",
            values.line(path),
        )


def pipeline(values: Values) -> Iterator[Problem]:
    """The two ways to say the number of stages agree."""
    path, mesh_path = "pipeline.stages", "mesh.pipe"
    stages, size = values.get(path), values.get(mesh_path)
    if stages != "auto" and values.is_given(mesh_path) and stages != size:
        yield Problem(
            path,
            f'{stages} contradicts "{mesh_path}": {size}. Write one of the two.',
            values.line(path),
        )


def data_parallel_size(values: Values) -> int | None:
    """Return over how many devices the batch is split, where the mesh fixes it."""
    size = 1
    for name in ("replica", "data", "expert"):
        axis = values.get(f"mesh.{name}")
        if axis < 1:
            return None
        size *= axis
    return size


def batch_triangle(values: Values) -> Iterator[Problem]:
    """The batch sizes hold together, as far as that can be known without devices."""
    if elastic_rules.is_on(values):
        return
    names = (TRAIN, MICRO, ACCUMULATION)
    entries = (values.given.get(name) for name in names)
    if any(entry is not None and entry.pending for entry in entries):
        return
    problem = check(BatchConfig(*(values.get(name) for name in names)), data_parallel_size(values))
    if problem is not None:
        yield replace(problem, line=values.line(problem.path))


def data(values: Values) -> Iterator[Problem]:
    """Rows fit the model, the tokenizer's words fit its table, and files are named."""
    if not values.has_section("data"):
        return
    rows, longest = values.get("data.sequence_length"), values.get("model.sequence_length")
    path = "data.sequence_length"
    if rows is None:
        yield Problem(
            path,
            'missing; set it, or "model.sequence_length".',
            lacks=(path, "model.sequence_length"),
        )
    elif longest is not None and rows > longest:
        yield Problem(
            path, f'{rows} is longer than "model.sequence_length" {longest}.', values.line(path)
        )
    yield from _split_sequence(values, path, rows)
    window = values.get("model.sliding_window")
    if rows is not None and window is not None and rows > window:
        yield Problem(
            path,
            f'{rows} is longer than "model.sliding_window" {window}, and windows are not built '
            f"yet; with at most {window} tokens every token sees all before it, as it should.",
            values.line(path),
        )
    kind, file = values.get("data.tokenizer.kind"), values.get("data.tokenizer.path")
    if kind == "file" and file is None:
        yield Problem("data.tokenizer.path", 'missing; "kind": "file" needs a tokenizer.json.')
    if kind != "file" and file is not None:
        yield Problem(
            "data.tokenizer.path",
            f'{shown(file)} is given, but "data.tokenizer.kind" is "{kind}"; set it to "file".',
            values.line("data.tokenizer.path"),
        )
    yield from _vocabulary(values, kind)


def _split_sequence(values: Values, path: str, rows: int | None) -> Iterator[Problem]:
    """Devices that share a sequence have parts of the same length."""
    shards = values.get("mesh.seq")
    if rows is None or rows % shards == 0:
        return
    below = rows // shards * shards
    near = [str(length) for length in (below, below + shards) if length]
    divisors = [n for n in range(1, shards) if rows % n == 0]
    yield Problem(
        path,
        f'{rows} is not divisible by "mesh.seq" {shards} (remainder {rows % shards}). Use '
        f'{" or ".join(near)} tokens, or "mesh.seq": {divisors[-1]}.',
        values.line(path),
    )


def _vocabulary(values: Values, kind: str) -> Iterator[Problem]:
    path = "data.tokenizer.vocab_size"
    words, table = values.get(path), values.get("model.vocab_size")
    if kind == "byte" and words != BYTE_VOCABULARY:
        yield Problem(path, f"{words} given, but bytes have {BYTE_VOCABULARY} ids; remove it.",
                      values.line(path))  # fmt: skip
    elif kind == "file" and words is not None:
        yield Problem(path, f"{words} given, but the file says how many ids there are; remove it.",
                      values.line(path))  # fmt: skip
    elif table is not None and words is not None and table < words:
        yield Problem(
            "model.vocab_size",
            f'{table} is smaller than the tokenizer\'s {words} ids ("{path}"); '
            + (
                'use the tokenizer of "model.hf".'
                if values.is_given("model.hf")
                else "leave it out to use the tokenizer's size."
            ),
            values.line("model.vocab_size"),
        )


def sweep(values: Values) -> Iterator[Problem]:
    """The least is not more than the most, and timing starts before it ends."""
    for low, high in (
        ("sweep.min_micro_batch_size", "sweep.max_micro_batch_size"),
        ("sweep.measure_first_step", "sweep.measure_last_step"),
    ):
        least, most = values.get(low), values.get(high)
        if most is not None and least > most:
            yield Problem(low, f'{least} is above "{high}" {most}.', values.line(low))


def tensor_sizes(values: Values) -> Iterator[Problem]:
    """DeepSpeed's sizes of tensor parallelism agree with each other and with the mesh; the patterns
    of layer specs are regular expressions."""
    tensor = values.get("mesh.tensor")
    for path in ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size"):
        size = values.get(path)
        if size > 1 and size != tensor:
            yield Problem(
                path,
                f'{size} contradicts "mesh.tensor": {tensor}. They set the same thing; keep the '
                "second.",
                values.line(path),
            )
    section = "tensor_parallel.partition_config.layer_specs"
    for index, spec in enumerate(values.patterned.get(section) or []):
        path = f"{section}[{index}].patterns"
        given = spec.get("patterns") or []
        for pattern in [given] if isinstance(given, str) else given:
            try:
                re.compile(pattern)
            except re.error as error:
                yield Problem(
                    path,
                    f"{shown(pattern)} is no regular expression ({error}).",
                    values.line(path),
                )


RULES: tuple[Rule, ...] = (
    refused_features,
    one_precision,
    loss_scale,
    half_master,
    summed_gradients,
    offload,
    optimizer,
    mesh,
    pipeline,
    tensor_sizes,
    elastic_rules.rules,
    batch_triangle,
    model,
    patterns.rules,
    remat_rules.rules,
    data,
    sweep,
)


def broken_rules(values: Values) -> list[Problem]:
    """Return every problem that `RULES` find in `values`."""
    return [problem for rule in RULES for problem in rule(values)]

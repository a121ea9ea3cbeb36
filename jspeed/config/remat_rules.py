"""Rematerialisation from keys to a policy: `model.remat`, DeepSpeed's `activation_checkpointing`,
and what must hold between them and the other keys."""

from collections.abc import Iterator

from jspeed.config.problem import Problem, shown
from jspeed.config.remat import Budget, Checkpoint, LayerRange, Remat, parse, policies
from jspeed.config.values import Values

PATH, _SECTION = "model.remat", "activation_checkpointing"
_CPU, _NUMBER = f"{_SECTION}.cpu_checkpointing", f"{_SECTION}.number_checkpoints"
_PARTITION = f"{_SECTION}.partition_activations"


def of_model(values: Values) -> Remat | Budget:
    """Return what DeepSpeed's `activation_checkpointing` asks for, or else `model.remat`."""
    count, layers = values.get(_NUMBER), values.get("model.layers")
    if not values.get(_CPU) and count is None:
        return parse(values.get(PATH))
    group = 1 if count is None else layers // count
    return Checkpoint(offload=("layer_in",) if values.get(_CPU) else (), layers=group)


def without_model(values: Values) -> Iterator[Problem]:
    """DeepSpeed's keys act on jspeed's own models; a model of the user's checkpoints itself."""
    if values.has_section("model"):
        return
    for path in (_CPU, _NUMBER, _PARTITION):
        entry = values.given.get(path)
        if entry is not None and entry.value:
            yield Problem(
                path,
                f'{shown(entry.value)} is for jspeed\'s own models (section "model"). In a model '
                "of your own put jax.checkpoint, nnx.remat or nn.remat around its layers.",
                entry.line,
            )


def rules(values: Values) -> Iterator[Problem]:
    """Ranges fit the layers, DeepSpeed's keys agree with ours, and pipelines get what they can."""
    layers = values.get("model.layers")
    if not values.has_section("model") or not layers:
        return
    yield from _deepspeed(values, layers)
    remat, line = of_model(values), values.line(PATH)
    if isinstance(remat, Budget):
        return
    if isinstance(remat, tuple):
        yield from _ranges(remat, layers, line)
    elif isinstance(remat, Checkpoint) and layers % remat.layers and not values.get(_NUMBER):
        yield Problem(PATH, _uneven(remat.layers, layers), line)
    for policy in policies(remat):
        if isinstance(policy, Checkpoint) and set(policy.save) & set(policy.offload):
            twice = ", ".join(sorted(set(policy.save) & set(policy.offload)))
            yield Problem(PATH, f"{twice} is to be saved and offloaded; name it once.", line)
        inner = isinstance(policy, Checkpoint) and policy.layers > 1 and set(policy.offload)
        if inner and inner != {"layer_in"}:
            names = ", ".join(sorted(inner - {"layer_in"}))
            yield Problem(
                PATH,
                f"offload {names} is not for checkpoints of several layers: XLA does not compile "
                "arrays in host memory that a loop inside a loop reads. There only layer_in can "
                "be offloaded; save the others.",
                line,
            )
    if values.get("mesh.pipe") > 1:
        yield from _in_pipelines(remat, values)


def _uneven(group: int, layers: int) -> str:
    return (
        f"layers_per_checkpoint {group} does not divide {layers} layers (remainder "
        f"{layers % group})."
    )


def _deepspeed(values: Values, layers: int) -> Iterator[Problem]:
    count = values.get(_NUMBER)
    if count is not None and (count > layers or layers % count):
        yield Problem(
            _NUMBER,
            f'{count} checkpoints do not divide "model.layers" {layers} into equal groups.',
            values.line(_NUMBER),
        )
    given = values.given.get(PATH)
    for path in (_CPU, _NUMBER):
        if values.get(path) and given is not None and given.value not in ("none", "full"):
            yield Problem(
                path,
                f'{shown(values.get(path))} contradicts "{PATH}": {shown(given.value)}. Say all of '
                f'it there, as {{"offload": ["layer_in"], "layers_per_checkpoint": 1}}, or leave '
                "that key out.",
                values.line(path),
            )
    if values.get(_PARTITION) and not values.get("model.sequence_sharding"):
        yield Problem(
            _PARTITION,
            'true contradicts "model.sequence_sharding": false, which is what splits kept '
            "activations over mesh.tensor. Set it to true.",
            values.line(_PARTITION),
        )


def _ranges(remat: tuple[LayerRange, ...], layers: int, line: int | None) -> Iterator[Problem]:
    free = 0
    for part in remat:
        name = f"layers [{part.first}, {part.last}]"
        if part.last >= layers:
            yield Problem(PATH, f"{name}: the last of {layers} layers is {layers - 1}.", line)
        if part.first < free:
            yield Problem(PATH, f"{name} do not come after those before them; ranges ascend.", line)
        free = part.last + 1
        count = part.last - part.first + 1
        if isinstance(part.policy, Checkpoint) and count % part.policy.layers:
            yield Problem(PATH, f"{name}: {_uneven(part.policy.layers, count)}", line)


def _in_pipelines(remat: Remat, values: Values) -> Iterator[Problem]:
    """A stage runs one loop over its layers, and keeps what is kept in the device's buffers."""
    checkpoints = [policy for policy in policies(remat) if isinstance(policy, Checkpoint)]
    asked = {
        "layer ranges are": isinstance(remat, tuple),
        "checkpoints of several layers are": any(policy.layers > 1 for policy in checkpoints),
        "offloaded tensors are": any(policy.offload for policy in checkpoints),
    }
    path = next((path for path in (_CPU, _NUMBER) if values.get(path)), PATH)
    for what, has in asked.items():
        if has:
            yield Problem(
                path,
                f'{what} not for pipelines ("mesh.pipe" {values.get("mesh.pipe")}): a stage runs '
                "one loop over its layers and keeps microbatches in buffers on the device. Use a "
                'word or {"save": [...]}.',
                values.line(path),
            )

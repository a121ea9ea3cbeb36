"""The `elasticity` section beside the rest of a file: what it fills in, and what contradicts it."""

from collections.abc import Iterator
from dataclasses import replace

from jspeed.config.batch import ACCUMULATION, MICRO, TRAIN
from jspeed.config.check import Entry, Source
from jspeed.config.elastic_batch import SECTION, VERSIONS, ElasticBatch, choose
from jspeed.config.keys import KEYS
from jspeed.config.problem import Problem, shown
from jspeed.config.sections import ElasticityConfig
from jspeed.config.values import Values

_SIZES = (TRAIN, MICRO, ACCUMULATION)
_COPY = f"{SECTION}.model_parallel_size"
_IGNORE = f"{SECTION}.ignore_non_elastic_batch_info"


def is_on(values: Values) -> bool:
    """Whether `elasticity` chooses the batch sizes."""
    return values.get(f"{SECTION}.enabled")


def of_section(values: Values) -> ElasticityConfig | None:
    """Return what a batch size is chosen from, or None when the sizes are given."""
    if not is_on(values):
        return None
    fields = {name: values.get(f"{SECTION}.{name}") for name in ElasticityConfig.__slots__}
    fields["micro_batch_sizes"] = tuple(fields["micro_batch_sizes"])
    return ElasticityConfig(**fields)


def derive(values: Values) -> Values:
    """Return `values` with the batch size that `elasticity` chooses, and with a mesh and a
    `model_parallel_size` that follow each other."""
    if not is_on(values):
        return values
    given = dict(values.given)

    def put(path: str, value: int | None, note: str) -> None:
        base = given.get(path) or Entry(KEYS[path], None, Source.DEFAULT)
        given[path] = replace(base, value=value, note=note, pending=False)

    in_mesh = _model_devices(values)
    if in_mesh > 1 and not values.is_given(_COPY):
        put(_COPY, in_mesh, "from the mesh")
    elif in_mesh == 1 and values.get(_COPY) > 1 and not values.is_given("mesh.tensor"):
        put("mesh.tensor", values.get(_COPY), f'from "{_COPY}"')
    values = replace(values, given=given)
    chosen = _chosen(values)
    if isinstance(chosen, ElasticBatch):
        sizes = f"{chosen.gpu_counts[0]} to {chosen.gpu_counts[-1]}"
        note = f'chosen by "{SECTION}": {len(chosen.gpu_counts)} numbers of devices, {sizes}'
        for path in _SIZES:
            if (path == TRAIN or path in given) and not _contradicts(values, path, chosen):
                put(path, chosen.train_batch_size if path == TRAIN else None, note)
    return replace(values, given=given)


def rules(values: Values) -> Iterator[Problem]:
    """The settings are possible, and no other key says what `elasticity` chooses."""
    if not is_on(values):
        return
    problem = next(_wrong_settings(values), None)
    if problem is not None:
        yield problem
        return
    chosen = _chosen(values)
    if not isinstance(chosen, ElasticBatch):
        yield replace(chosen, line=values.line(chosen.path))
        return
    for path in _SIZES:
        if _contradicts(values, path, chosen):
            yield Problem(
                path,
                f'{shown(values.get(path))} is given, but "{SECTION}" chooses the batch '
                f"({chosen.train_batch_size} rows). Leave it out, or set "
                f'"{_IGNORE}": true to have it ignored.',
                values.line(path),
            )
    yield from _mesh(values)


def _wrong_settings(values: Values) -> Iterator[Problem]:
    version = values.get(f"{SECTION}.version")
    if version not in VERSIONS:
        path = f"{SECTION}.version"
        text = f"{shown(version)} is not one that DeepSpeed has: 0.1 or 0.2."
        yield Problem(path, text, values.line(path))
    if not values.get(f"{SECTION}.micro_batch_sizes"):
        path = f"{SECTION}.micro_batch_sizes"
        yield Problem(path, "[] names no size; expected at least one.", values.line(path))
    low, high = f"{SECTION}.min_gpus", f"{SECTION}.max_gpus"
    if values.get(low) > values.get(high):
        text = f'{values.get(low)} is above "{high}" {values.get(high)}.'
        yield Problem(low, text, values.line(low))
    if version == 0.1 and values.get(_COPY) > 1:
        yield Problem(
            f"{SECTION}.version",
            "0.1 does not know of several devices that hold one copy of the model "
            f'("{_COPY}": {values.get(_COPY)}). Use 0.2.',
            values.line(f"{SECTION}.version"),
        )


def _mesh(values: Values) -> Iterator[Problem]:
    in_mesh, copy = _model_devices(values), values.get(_COPY)
    if in_mesh != copy:
        yield Problem(
            _COPY,
            f'{copy} contradicts "mesh": pipe x seq x tensor is {in_mesh}. They set the same '
            "thing; keep the second.",
            values.line(_COPY),
        )
    size = values.get("mesh.data")
    if size > 0:
        yield Problem(
            "mesh.data",
            f'{size} fixes the number of devices, which "{SECTION}" lets change. Leave it out: '
            "the data axis takes what devices there are.",
            values.line("mesh.data"),
        )


def _chosen(values: Values) -> ElasticBatch | Problem:
    problem = next(_wrong_settings(values), None)
    section = of_section(values)
    assert section is not None  # only asked where it is on
    return choose(section) if problem is None else problem


def _contradicts(values: Values, path: str, chosen: ElasticBatch) -> bool:
    """Whether a batch key says something of its own; "auto" and the chosen size do not."""
    entry = values.given.get(path)
    if entry is None or entry.value is None or values.get(_IGNORE):
        return False
    same = path == TRAIN and entry.value == chosen.train_batch_size
    return entry.source is not Source.AUTO and not same


def _model_devices(values: Values) -> int:
    """Devices of the mesh that hold one copy of the model together."""
    return values.get("mesh.pipe") * values.get("mesh.seq") * values.get("mesh.tensor")

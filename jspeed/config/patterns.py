"""Patterns of block-sparse attention: from their keys to a section, and what must hold."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jspeed.config.keys import KEYS
from jspeed.config.keys_attention import KEYS_OF_MODE, PATTERN_KEYS
from jspeed.config.model_families import MODEL_FAMILIES
from jspeed.config.problem import Problem, shown
from jspeed.config.sections import SparseAttentionConfig
from jspeed.config.values import Values

SECTION, OF_MODEL = "sparse_attention", "model.attention"
_BLOCKS = (16, 32, 64, 128)
_AT_MOST_ALL = {
    "variable": ("num_random_blocks",),
    "bigbird": ("num_random_blocks", "num_sliding_window_blocks", "num_global_blocks"),
}
"""Of each pattern, what cannot be more than a sequence has; wider windows than that see all."""
_WITH_INDICES = ("variable", "bslongformer")
_NAMES = (*(key.path for key in PATTERN_KEYS), "seed")


def is_asked(values: Values) -> bool:
    """Whether there is a section `sparse_attention`, which may be empty."""
    return values.is_given(SECTION) or values.has_section(SECTION)


def of_section(values: Values) -> SparseAttentionConfig | None:
    """Return what `sparse_attention` says, or None without one.

    It has no seed: its random blocks are of that of a pattern in the model, or else of seed 0.
    """
    if not is_asked(values):
        return None
    section = _read(values, SECTION, values.get(f"{SECTION}.mode"))
    if values.get(f"{OF_MODEL}.kind") is None:
        return section
    return replace(section, seed=values.get(f"{OF_MODEL}.seed"))


def of_model(values: Values) -> SparseAttentionConfig | None:
    """Return what `model.attention.kind` says, or else `sparse_attention`; None for neither."""
    kind = values.get(f"{OF_MODEL}.kind")
    return of_section(values) if kind is None else _read(values, OF_MODEL, kind)


def undecided_attention(values: Values) -> Iterator[str]:
    """Return the keys `attention` that decide nothing yet: a decoder sees nothing behind itself."""
    if not values.has_section("model") or _is_encoder(values):
        return
    for prefix, mode in _modes(values).items():
        sideways = values.get(f"{prefix}.horizontal_global_attention")
        if mode is not None and mode != "dense" and not sideways:
            yield f"{prefix}.attention"


def _is_encoder(values: Values) -> bool:
    family = MODEL_FAMILIES.get(values.get("model.family"))
    return family is not None and family.masked


def _read(values: Values, prefix: str, mode: str) -> SparseAttentionConfig:
    fields: dict[str, Any] = {"mode": mode} | {
        name: values.get(f"{prefix}.{name}") for name in _NAMES if f"{prefix}.{name}" in KEYS
    }
    for name, value in fields.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    return SparseAttentionConfig(**fields)


def rules(values: Values) -> Iterator[Problem]:
    """Every key belongs to the pattern, the numbers fit each other, and one place says it all."""
    places = _modes(values)
    for prefix, mode in places.items():
        if mode is not None:
            which = (f"{prefix}.{'mode' if prefix == SECTION else 'kind'}",)
            found = (_foreign_keys, _numbers, _too_many)
            for problem in (one for rule in found for one in rule(values, prefix, mode)):
                yield replace(problem, lacks=which)
    if places[OF_MODEL] is None:
        yield from _without_kind(values)
    elif places[SECTION] is not None:
        yield from _contradiction(values)
    yield from _computed_elsewhere(values)


def _modes(values: Values) -> dict[str, str | None]:
    """What each of the two places asks for."""
    return {
        SECTION: values.get(f"{SECTION}.mode") if is_asked(values) else None,
        OF_MODEL: values.get(f"{OF_MODEL}.kind"),
    }


def _computed_elsewhere(values: Values) -> Iterator[Problem]:
    """What computes causal attention of all tokens only, and what is asked to compute more."""
    pattern = of_model(values) if values.has_section("model") else None
    mode = "dense" if pattern is None else pattern.mode
    sparse = mode != "dense"
    path = f"{OF_MODEL}.implementation"
    if sparse and values.get(path) == "cudnn":
        yield Problem(
            path,
            f'"cudnn" has no block-sparse attention, which the pattern "{mode}" asks for. '
            'Use "auto".',
            values.line(path),
        )
    path = f"{OF_MODEL}.sequence_parallel"
    method = values.get(path)
    encoder = values.has_section("model") and _is_encoder(values)
    if method in ("ring", "allgather") and (sparse or encoder):
        what = "a pattern of blocks" if sparse else "what comes after a token"
        yield Problem(
            path, f'"{method}" does not see {what}; use "ulysses" or "auto".', values.line(path)
        )


def _changed(values: Values, prefix: str) -> Iterator[str]:
    """The names of the keys that ask for something."""
    for name in _NAMES:
        entry = values.given.get(f"{prefix}.{name}")
        if entry is not None and entry.value not in (None, KEYS[f"{prefix}.{name}"].default):
            yield name


def _foreign_keys(values: Values, prefix: str, mode: str) -> Iterator[Problem]:
    which = "mode" if prefix == SECTION else "kind"
    for name in _changed(values, prefix):
        if name in KEYS_OF_MODE[mode]:
            continue
        owners = [f'"{other}"' for other, names in KEYS_OF_MODE.items() if name in names]
        yield Problem(
            f"{prefix}.{name}",
            f'{shown(values.get(f"{prefix}.{name}"))} means nothing to "{which}": "{mode}"; it '
            f"belongs to {' and '.join(owners)}. Remove it, or choose another pattern.",
            values.line(f"{prefix}.{name}"),
        )


def _numbers(values: Values, prefix: str, mode: str) -> Iterator[Problem]:
    def get(name: str) -> Any:
        return values.get(f"{prefix}.{name}")

    def problem(name: str, text: str) -> Problem:
        return Problem(
            f"{prefix}.{name}", f"{shown(get(name))} {text}", values.line(f"{prefix}.{name}")
        )

    if get("block") not in _BLOCKS:
        yield problem("block", "is no size of blocks; expected 16, 32, 64 or 128.")
    if mode in ("fixed", "variable"):
        sideways = get("horizontal_global_attention")
        if sideways and get("attention") == "unidirectional":
            yield problem(
                "horizontal_global_attention",
                'lets global blocks see what comes after them, against "attention": '
                '"unidirectional". Set one of them to the other.',
            )
    if mode == "fixed":
        local, wide = get("num_local_blocks"), get("num_global_blocks")
        ways, most = get("num_different_global_patterns"), local // max(1, wide)
        if wide < 1 or local % wide:
            yield problem(
                "num_global_blocks", f'does not divide "{prefix}.num_local_blocks": {local}.'
            )
        elif ways > most:
            yield problem(
                "num_different_global_patterns",
                f"is more than the {most} places of {wide} global block(s) in a window of {local}.",
            )
        elif ways > 1 and not get("different_layout_per_head"):
            yield problem(
                "num_different_global_patterns",
                f'needs "{prefix}.different_layout_per_head": true.',
            )
    if mode in ("variable", "bslongformer") and get("global_block_end_indices") is not None:
        yield from _ranges(values, prefix)
    windows = "local_window_blocks"
    if mode == "variable" and (not get(windows) or not all(get(windows))):
        yield problem(windows, "is no list of window sizes; expected at least one, each above 0.")


def _too_many(values: Values, prefix: str, mode: str) -> Iterator[Problem]:
    """Blocks that the sequences of a run have not."""
    block = values.get(f"{prefix}.block")
    path = "data.sequence_length"
    path = path if values.get(path) is not None else "model.sequence_length"
    tokens = values.get(path) if values.has_section("model") else None
    if tokens is None or block not in _BLOCKS:
        return
    blocks = -(-tokens // block)
    have = f'"{path}": {tokens} has {blocks} block(s) of {block}'
    for name in _AT_MOST_ALL.get(mode, ()):
        given = values.get(f"{prefix}.{name}")
        if given > blocks:
            text = f"is more blocks than there are: {have}."
            yield Problem(f"{prefix}.{name}", f"{given} {text}", values.line(f"{prefix}.{name}"))
    starts = values.get(f"{prefix}.global_block_indices") if mode in _WITH_INDICES else None
    if starts and min(starts) >= blocks:
        name = f"{prefix}.global_block_indices"
        text = f"lies past the end, so nothing would be global: {have}, numbered from 0."
        yield Problem(name, f"{shown(starts)} {text}", values.line(name))


def _ranges(values: Values, prefix: str) -> Iterator[Problem]:
    path = f"{prefix}.global_block_end_indices"
    starts, ends = values.get(f"{prefix}.global_block_indices"), values.get(path)
    if len(starts) != len(ends) or any(a >= b for a, b in zip(starts, ends, strict=False)):
        yield Problem(
            path,
            f'{shown(ends)} does not fit "{prefix}.global_block_indices": {shown(starts)}; '
            "expected as many, each above its start.",
            values.line(path),
        )


def _without_kind(values: Values) -> Iterator[Problem]:
    for name in _changed(values, OF_MODEL):
        path = f"{OF_MODEL}.{name}"
        yield Problem(
            path,
            f"{shown(values.get(path))} is given, but no pattern beside it; say which with "
            f'"{OF_MODEL}.kind", or move it to "{SECTION}".',
            values.line(path),
            lacks=(f"{OF_MODEL}.kind",),
        )


def _contradiction(values: Values) -> Iterator[Problem]:
    ours, theirs = of_model(values), of_section(values)
    assert ours is not None
    assert theirs is not None
    if ours.meant() == theirs.meant():
        return
    names = ["mode", *_NAMES]
    name = next(n for n in names if ours.meant().get(n) != theirs.meant().get(n))
    there, here = f"{SECTION}.{name}", f"{OF_MODEL}.{'kind' if name == 'mode' else name}"
    yield Problem(
        there,
        f'{shown(getattr(theirs, name))} contradicts "{here}": {shown(getattr(ours, name))}. Say '
        "it in one of the two places.",
        values.line(there) or values.line(here),
    )

"""What must hold between the keys of the `model` section."""

from collections.abc import Iterator

from jspeed.config.keys import KEYS
from jspeed.config.model_families import MODEL_FAMILIES
from jspeed.config.problem import Problem, shown
from jspeed.config.values import Values


def model(values: Values) -> Iterator[Problem]:
    """Heads divide the width, and each family gets its own keys only."""
    if not values.has_section("model"):
        return
    family, hidden, heads, kv_heads = (
        values.get(f"model.{name}") for name in ("family", "hidden_size", "heads", "kv_heads")
    )
    if hidden and heads and hidden % heads and not values.get("model.head_dim"):
        yield Problem(
            "model.hidden_size",
            f'{hidden} is not divisible by "model.heads" {heads} (remainder {hidden % heads}).',
            values.line("model.hidden_size"),
        )
    if heads and kv_heads and heads % kv_heads:
        yield Problem(
            "model.kv_heads",
            f'{kv_heads} does not divide "model.heads" {heads}; every key/value head serves the '
            "same number of query heads.",
            values.line("model.kv_heads"),
        )
    learned = family is not None and MODEL_FAMILIES[family].learned_positions
    if learned and heads and kv_heads and kv_heads != heads:
        yield Problem(
            "model.kv_heads",
            f"{kv_heads} differs from heads {heads}, but {family} has no grouped-query attention; "
            'use "family": "llama".',
            values.line("model.kv_heads"),
        )
    scaled = values.has_section("model.rope_scaling")
    theta = values.get("model.rope_theta") != KEYS["model.rope_theta"].default
    if learned and (scaled or theta):
        name = "model.rope_scaling" if scaled else "model.rope_theta"
        yield Problem(
            name,
            f'{family} has learned positions; remove it, or use "family": "llama".',
            values.line(name),
        )
    if family is not None and not learned and values.get("model.dropout"):
        yield Problem(
            "model.dropout",
            f"{values.get('model.dropout'):g} is given, but {family} has no dropout; set it to 0.",
            values.line("model.dropout"),
        )
    yield from _of_other_families(values, family)
    path = "model.attention.sequence_parallel"
    if values.get(path) == "ring" and values.get("mesh.pipe") > 1:
        yield Problem(
            path,
            f'"ring" does not go with "mesh.pipe" {values.get("mesh.pipe")}: its permutes would '
            'stand in branches that stages take differently. Use "ulysses" or "allgather".',
            values.line(path),
        )
    low, high = (values.get(f"model.rope_scaling.{end}_freq_factor") for end in ("low", "high"))
    if scaled and low >= high:
        yield Problem(
            "model.rope_scaling.low_freq_factor",
            f"{low:g} must be below high_freq_factor {high:g}.",
            values.line("model.rope_scaling.low_freq_factor"),
        )


def _of_other_families(values: Values, family: str | None) -> Iterator[Problem]:
    """Keys that only other families have."""
    if family is None:
        return
    traits = MODEL_FAMILIES[family]
    for name, has in (
        ("head_dim", not traits.learned_positions),
        ("sliding_window", not traits.learned_positions),
        ("activation", traits.learned_positions),
        ("token_types", traits.masked),
        ("output_bias", traits.masked),
    ):
        path = f"model.{name}"
        value = values.get(path)
        if value and not has:
            yield Problem(
                path,
                f"{shown(value)} is given, which {family} does not have; remove it.",
                values.line(path),
            )
    if values.get("model.head_dim") and values.get("model.head_dim") % 2:
        yield Problem(
            "model.head_dim",
            f"{values.get('model.head_dim')} is odd, but rotary embedding turns pairs of features.",
            values.line("model.head_dim"),
        )

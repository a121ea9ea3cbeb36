"""From a Hugging Face `config.json` to the keys of a `model` section, and back."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jspeed.config.hf_keys import ACTIVATIONS, HF_FAMILIES, REFUSED, REQUIRED, HfFamily, Taken
from jspeed.config.problem import shown
from jspeed.core.errors import ConfigError

CONFIG_NAME = "config.json"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def read_document(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder with a Hugging Face model.

    Raises:
        ConfigError: there is none, or it is not a JSON object.
    """
    path = folder / CONFIG_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        state = (
            f"no {CONFIG_NAME} in it"
            if folder.is_dir()
            else "no such folder, and nothing is fetched from the network (`hf download NAME "
            "--local-dir DIR` does)"
        )
        raise ConfigError(
            f'"{folder}": {state}. Expected a folder as save_pretrained of transformers writes it; '
            "beside weights that DeepSpeed consolidated, put the config.json of their model."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f'"{path}": cannot be read: {error}.') from None
    if not isinstance(document, dict):
        raise ConfigError(f'"{path}": holds a JSON {type(document).__name__}, expected an object.')
    return document


def model_keys(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys of a `model` section that describe the same model.

    Args:
        document: a `config.json`, in the spelling of transformers 4 or 5.
        where: names the file in messages.

    Raises:
        ConfigError: a key is missing, or asks for what jspeed does not compute; all are listed.
    """
    kind = document.get("model_type")
    family = HF_FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ConfigError(
            f'"{where}": "model_type": {shown(kind)} is not a family that jspeed has: '
            f"{', '.join(HF_FAMILIES)}."
        )
    problems = list(_refusals(document, family))
    keys: dict[str, Any] = {"family": kind}
    for name, key in family.keys.items():
        if not isinstance(key, Taken):
            continue
        value = document.get(name, key.default)
        if value is REQUIRED:
            problems.append(f'"{name}": missing')
        elif value is not None:
            keys[key.ours] = value
    keys.update(family.also_ours)
    keys.update(_activation(document, family, problems))
    if family.rotary:
        keys.update(_rope(document, problems))
        dim = document.get("head_dim", family.head_dim)
        if dim is not None:
            keys["head_dim"] = dim
    keys.update(_window(document, family, problems))
    if problems:
        raise ConfigError("\n".join(f'"{where}": {problem}.' for problem in problems))
    return keys


def _refusals(document: Mapping[str, Any], family: HfFamily) -> Iterator[str]:
    """What is asked for and is not computed here, one text per key."""
    fixed: dict[str, tuple[Any, ...]] = dict(REFUSED)
    for name, key in family.keys.items():
        if not isinstance(key, Taken):
            fixed[name] = key.values
    for name, values in fixed.items():
        if name in document and document[name] not in values:
            yield (
                f'"{name}": {shown(document[name])} is not supported for {document["model_type"]}, '
                f"only {' or '.join(shown(value) for value in values)}"
            )
    named = document.get("architectures") or []
    heads = [name for name in named if name.endswith(("Classification", "QuestionAnswering"))]
    if heads:
        yield (
            f'"architectures": {shown(heads)} has a head of its own; jspeed has '
            f"{family.architecture}"
        )


def _activation(
    document: Mapping[str, Any], family: HfFamily, problems: list[str]
) -> dict[str, Any]:
    name, default = family.activation
    value = document.get(name, default)
    if value not in family.activations:
        known = ", ".join(family.activations)
        problems.append(f'"{name}": {shown(value)} is not supported, only {known}')
        return {}
    ours = ACTIVATIONS[value]
    return {} if ours == "silu" else {"activation": ours}


def _rope(document: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The rotary embedding: `rope_parameters` of transformers 5, or `rope_theta` and
    `rope_scaling`, whose `rope_type` was once `type`; where both are, the older name wins there."""
    spelling = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    found: Mapping[str, Any] = document.get(spelling) or {}
    theta = found.get("rope_theta", document.get("rope_theta", 10_000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    keys: dict[str, Any] = {"rope_theta": theta}
    if any(isinstance(value, Mapping) for value in found.values()):
        problems.append(f'"{spelling}": {shown(found)}: rotations by kind of layer have no support')
        return keys
    partial = found.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        problems.append(f'"{spelling}.partial_rotary_factor": {partial} is not supported, only 1')
    if kind == "llama3":
        missing = [name for name in _LLAMA3 if name not in found]
        problems += [f'"{spelling}.{name}": missing' for name in missing]
        original = found.get("original_max_position_embeddings") or document.get(
            "original_max_position_embeddings", document.get("max_position_embeddings")
        )
        keys["rope_scaling"] = {
            "rope_type": "llama3",
            **{name: found.get(name) for name in _LLAMA3},
            "original_max_position_embeddings": original,
        }
    elif kind != "default":
        problems.append(
            f'"{spelling}.rope_type": {shown(kind)} is not supported, only default and llama3'
        )
    return keys


def _window(document: Mapping[str, Any], family: HfFamily, problems: list[str]) -> dict[str, Any]:
    """The sliding window, if the same holds for all layers."""
    if family.windows == "none":
        return {}
    window = document.get("sliding_window", 4096)
    kinds = document.get("layer_types") if family.windows == "by layer" else None
    if family.windows == "by layer":
        if not document.get("use_sliding_window", False):
            window = None
        elif kinds is None:
            layers = document.get("num_hidden_layers", 0)
            full = min(layers, document.get("max_window_layers", 28))
            kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if kinds is None:
        return {} if window is None else {"sliding_window": window}
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        problems.append(f'"layer_types": {shown(sorted(unknown))} is not supported')
    if window is None or "sliding_attention" not in kinds:
        return {}
    if "full_attention" in kinds:
        problems.append(
            '"layer_types": some layers have a sliding window and some have none, which is not '
            "supported"
        )
    return {"sliding_window": window}


def to_document(
    values: Mapping[str, Any], *, dtype: str, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a `config.json` that transformers 4 and 5 read as the same model.

    Args:
        values: a complete `model` section: `family`, and every value that the family has.
        dtype: of the weights, as "bfloat16".
        original: the `config.json` that the model came with; what jspeed has no keys for, as
            token ids and dropout rates, stays as it was there.
    """
    family = HF_FAMILIES[values["family"]]
    document: dict[str, Any] = dict(original or {})
    document["model_type"] = values["family"]
    document["architectures"] = [family.architecture]
    document["dtype"] = document["torch_dtype"] = dtype
    for name, key in family.keys.items():
        document[name] = values[key.ours] if isinstance(key, Taken) else key.values[0]
    if family.rotary and original:  # shorter rows do not make a model forget longer ones
        name = "max_position_embeddings"
        document[name] = max(document[name], original.get(name) or 0)
    name, default = family.activation
    ours = values.get("activation") or ACTIVATIONS[default]
    if ACTIVATIONS.get(document.get(name, "")) != ours:
        document[name] = next(theirs for theirs, known in ACTIVATIONS.items() if known == ours)
    if family.rotary:
        _write_rope(document, values)
        document["head_dim"] = values["head_dim"]
    if family.windows != "none":
        _write_window(document, family, values)
    return dict(sorted(document.items()))


def _write_rope(document: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Both spellings: transformers 4 does not know the new one."""
    theta, scaling = values["rope_theta"], values.get("rope_scaling")
    kind = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling}
    document["rope_theta"] = theta
    document["rope_scaling"] = None if scaling is None else kind
    document["rope_parameters"] = {**kind, "rope_theta": theta}


def _write_window(document: dict[str, Any], family: HfFamily, values: Mapping[str, Any]) -> None:
    window = values.get("sliding_window")
    document["sliding_window"] = window
    if family.windows == "by layer":
        kind = "full_attention" if window is None else "sliding_attention"
        document["use_sliding_window"] = window is not None
        document["max_window_layers"] = values["layers"] if window is None else 0
        document["layer_types"] = [kind] * values["layers"]

"""What a run file says, as shapes: its model, its mesh and its batches without data or devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.config import AutoFacts, Config
from jspeed.core.errors import ConfigError
from jspeed.data import Tokenizer
from jspeed.engine.build import RunPlan
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Layout
from jspeed.models import ModelFactory, build_model
from jspeed.nn.attention_sparse import make_pattern, share_of_scores


def for_devices(config: Config, devices: int | None, remarks: list[str]) -> tuple[Config, int]:
    """The configuration with `mesh.data` open where another number of devices is asked for."""
    mesh = config.mesh
    others = mesh.pipe * mesh.replica * mesh.expert * mesh.seq * mesh.tensor
    if devices is None:
        data = mesh.data
        if data == -1:
            data = max(1, config.zero.mics_shard_size)
            remarks.append(
                f'"mesh.data" takes all devices there are; laid out for {others * data}. '
                "--devices N lays out for another number."
            )
        return config, others * data
    if mesh.data != -1 and mesh.data * others != devices:
        remarks.append(
            f'"mesh.data": {mesh.data} gives way to {devices} devices; to train on them, leave it '
            "out."
        )
        config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=-1))
    return config, devices


def model_factory(config: Config, *, platform: str, remarks: list[str]) -> ModelFactory:
    """The model of a run file, its vocabulary told without reading the data.

    Args:
      config: of the run.
      platform: that it computes on, see `jspeed.nn.choose_implementation`.
      remarks: gets what was assumed.

    Raises:
      ConfigError: there is no model, or nothing tells its vocabulary.
    """
    model = config.model
    if model is None:
        raise ConfigError(
            '"model": missing. This command looks at the model of a run file; add a "model" '
            'section, as {"family": "gpt2", "layers": 12, "hidden_size": 768, "heads": 12, '
            '"sequence_length": 1024}.'
        )
    vocabulary = model.vocab_size
    if vocabulary is None:
        vocabulary, said = _vocabulary(config)
        remarks.append(said)
        vocabulary += model.traits.masked  # the mask
    return build_model(model, vocab_size=vocabulary, platform=platform)


def _vocabulary(config: Config) -> tuple[int, str]:
    """The size of the vocabulary without reading the data, and where it comes from."""
    data = config.data
    if data is None:
        raise ConfigError(
            '"model.vocab_size": missing, and there is no "data" section to take it from. Set it '
            "to the number of tokens."
        )
    given = data.tokenizer
    if given.vocab_size is None:
        if given.path is None:
            raise ConfigError('"data.tokenizer.path": missing; expected a tokenizer.json.')
        size = Tokenizer.load(given.path).vocab_size
        return size, f'vocabulary {size:,}, of the tokenizer in "data.tokenizer.path".'
    said = f'vocabulary {given.vocab_size:,}, from "data.tokenizer.vocab_size"'
    if given.kind == "bpe":
        said += "; a tokenizer trained on little text has fewer"
    return given.vocab_size, f"{said}."


def attention_remark(config: Config) -> str | None:
    """Which share of attention's scores the model of a run file computes; None for all."""
    model = config.model
    pattern = None if model is None else make_pattern(model.attention.pattern)
    if model is None or pattern is None:
        return None
    section = model.attention.pattern
    assert section is not None
    length = config.data.sequence_length if config.data else model.sequence_length
    causal = not model.traits.masked
    share = share_of_scores(pattern, model.heads, length, causal=causal)
    said = (
        f"attention: {section.mode} in blocks of {section.block}, which computes {share:.2%} of "
        f"the {length:,} x {length:,} scores"
    )
    if causal and section.attention == "bidirectional":
        said += (
            f'; "bidirectional" cannot let a token of {model.family} see what comes after it: the '
            "lower triangle of the layout is used"
        )
    return f"{said}."


def abstract_facts(config: Config, remarks: list[str]) -> AutoFacts:
    """What stands for an "auto" that only a run can resolve; none of these moves an array."""
    if config.autos:
        remarks.append(
            f'"auto" is left open here, and to be set for training: {", ".join(config.autos)}.'
        )
    rates = any(path.endswith("lr") for path in config.autos)
    sizes = any("batch_size" in path for path in config.autos)
    return AutoFacts(
        total_steps=(config.run.steps if config.run else 0) or 1,
        learning_rate=1.0 if rates else None,
        micro_batch_size=1 if sizes else None,
    )


def token_batch(config: Config, plan: RunPlan) -> dict[str, Any]:
    """The shapes of one global microbatch, `[micro batch x batch shards, sequence]` int32."""
    model, data = config.model, config.data
    assert model is not None
    length = data.sequence_length if data else model.sequence_length
    rows = plan.batch.micro_batch_size * plan.layout.batch_shards
    names = ["input_ids", "labels"]
    if data is not None and data.document_mask:
        names += ["segment_ids", "positions"]
    return {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}


def idle_axes(layout: Layout) -> list[str]:
    """A `tensor` axis that splits nothing holds the same parameters on all of its devices."""
    size = layout.sizes["tensor"]
    entries = (entry for leaf in layout.leaves.values() for entry in leaf.base)
    if size == 1 or any("tensor" in axes_of(entry) for entry in entries):
        return []
    return [
        f'"mesh.tensor": {size}, but no parameter is split over it: each is held {size} times. '
        'See "mesh.rules".'
    ]


def check_attention(config: Config, platform: str) -> None:
    """Refuses attention that a run's devices or dtype cannot compute; JAX would end in the middle.

    Args:
      config: with a `model` section.
      platform: a JAX platform name.

    Raises:
      ConfigError: cuDNN's attention is asked for where there is no NVIDIA GPU, or in float32.
    """
    assert config.model is not None
    if config.model.attention.implementation != "cudnn":
        return
    instead = 'Use "auto", which picks by platform and dtype, or "xla".'
    if platform not in ("gpu", "cuda"):
        raise ConfigError(
            '"model.attention.implementation": cudnn runs on NVIDIA GPUs only, and this run is on '
            f"{platform} devices. {instead}"
        )
    if config.precision.compute_dtype == "float32":
        raise ConfigError(
            '"model.attention.implementation": cudnn computes in float16 and bfloat16 only, and '
            f"this run is in float32. {instead}"
        )

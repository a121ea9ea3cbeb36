"""Rotary position embeddings (Su et al., RoFormer, 2021, section 3.4), halves convention of
Llama."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jspeed.core.shapes import Array, Float, Int


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of low frequencies, for contexts longer than trained on.

    Wavelengths above `original / low_freq_factor` are stretched by `factor`, those below
    `original / high_freq_factor` stay, those between are interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each pair of features: float64 `[dim / 2]`."""
    frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def apply_rope(
    x: Float[Array, "batch seq heads dim"],
    positions: Int[Array, "#batch seq"],
    frequencies: np.ndarray,
) -> Float[Array, "batch seq heads dim"]:
    """Rotates `x` `[batch, seq, heads, dim]` by `positions` `[batch or 1, seq]`, computed in
    fp32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)

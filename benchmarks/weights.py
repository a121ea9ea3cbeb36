"""Initial weights of a GPT-2 that every contestant starts from. NumPy only."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.shapes import Shape

_STDDEV = 0.02


def initial_weights(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Path -> fp32 array; those under `blocks` have the layers as their first dimension.

    Weights are normal with GPT-2's deviations (Radford et al., 2019, section 2.3), norms one,
    biases zero. Kernels are `[inputs, outputs]`, that of `qkv` `[width, 3, width]`.
    """
    rng = np.random.default_rng(seed)
    layers, width = shape.layers, shape.width
    residual = _STDDEV / math.sqrt(2 * layers)

    def normal(stddev: float, *dimensions: int) -> np.ndarray:
        return stddev * rng.standard_normal(dimensions, dtype=np.float32)

    weights = {
        "wte": normal(_STDDEV, shape.vocabulary, width),
        "wpe": normal(_STDDEV, shape.sequence, width),
        "blocks/attn/qkv/kernel": normal(_STDDEV, layers, width, 3, width),
        "blocks/attn/qkv/bias": np.zeros((layers, 3, width), np.float32),
        "blocks/attn/proj/kernel": normal(residual, layers, width, width),
        "blocks/attn/proj/bias": np.zeros((layers, width), np.float32),
        "blocks/mlp/fc/kernel": normal(_STDDEV, layers, width, 4 * width),
        "blocks/mlp/fc/bias": np.zeros((layers, 4 * width), np.float32),
        "blocks/mlp/proj/kernel": normal(residual, layers, 4 * width, width),
        "blocks/mlp/proj/bias": np.zeros((layers, width), np.float32),
    }
    for name, leading in (("blocks/ln_1", (layers,)), ("blocks/ln_2", (layers,)), ("ln_f", ())):
        weights[f"{name}/scale"] = np.ones((*leading, width), np.float32)
        weights[f"{name}/bias"] = np.zeros((*leading, width), np.float32)
    return {path: array.astype(np.float32) for path, array in weights.items()}

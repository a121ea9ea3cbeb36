"""Logits of Hugging Face's GPT-2 and Llama on made-up weights, for tests that need no torch.

    pip install torch transformers numpy
    python -m tests.models.make_reference

writes `tests/models/reference/*.npz`. Last made with torch 2.13.0 and transformers 5.23.0. The
weights are not stored: `weights` makes the same ones in the tests, from NumPy's frozen generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = Path(__file__).parent / "reference"
VOCAB, LAYERS, WIDTH, HEADS, INNER, SEQ = 64, 2, 64, 4, 96, 32
KV_HEADS, HEAD_DIM = 2, WIDTH // HEADS

LLAMA3_SCALING = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Frequencies below, above and between the two limits of the scaling all occur.
LLAMA_VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500_000.0, "tie_embeddings": False, "scaling": None},
    "llama3_tied": {"rope_theta": 10_000.0, "tie_embeddings": True, "scaling": LLAMA3_SCALING},
}

GPT2_SHAPES = {
    "wte": (VOCAB, WIDTH),
    "wpe": (SEQ, WIDTH),
    "blocks/ln_1/scale": (LAYERS, WIDTH),
    "blocks/ln_1/bias": (LAYERS, WIDTH),
    "blocks/attn/qkv/kernel": (LAYERS, WIDTH, 3 * WIDTH),
    "blocks/attn/qkv/bias": (LAYERS, 3 * WIDTH),
    "blocks/attn/proj/kernel": (LAYERS, WIDTH, WIDTH),
    "blocks/attn/proj/bias": (LAYERS, WIDTH),
    "blocks/ln_2/scale": (LAYERS, WIDTH),
    "blocks/ln_2/bias": (LAYERS, WIDTH),
    "blocks/mlp/fc/kernel": (LAYERS, WIDTH, INNER),
    "blocks/mlp/fc/bias": (LAYERS, INNER),
    "blocks/mlp/proj/kernel": (LAYERS, INNER, WIDTH),
    "blocks/mlp/proj/bias": (LAYERS, WIDTH),
    "ln_f/scale": (WIDTH,),
    "ln_f/bias": (WIDTH,),
}
LLAMA_SHAPES = {
    "embedding": (VOCAB, WIDTH),
    "blocks/attention_norm/scale": (LAYERS, WIDTH),
    "blocks/attn/q/kernel": (LAYERS, WIDTH, WIDTH),
    "blocks/attn/k/kernel": (LAYERS, WIDTH, KV_HEADS * HEAD_DIM),
    "blocks/attn/v/kernel": (LAYERS, WIDTH, KV_HEADS * HEAD_DIM),
    "blocks/attn/o/kernel": (LAYERS, WIDTH, WIDTH),
    "blocks/mlp_norm/scale": (LAYERS, WIDTH),
    "blocks/mlp/gate/kernel": (LAYERS, WIDTH, INNER),
    "blocks/mlp/up/kernel": (LAYERS, WIDTH, INNER),
    "blocks/mlp/down/kernel": (LAYERS, INNER, WIDTH),
    "norm/scale": (WIDTH,),
    "lm_head": (WIDTH, VOCAB),
}
_GPT2_NAMES = {
    "ln_1": "ln_1",
    "attn/qkv": "attn.c_attn",
    "attn/proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp/fc": "mlp.c_fc",
    "mlp/proj": "mlp.c_proj",
}
_LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """fp32 weights under jspeed's names; large enough that every part of a model matters."""
    random = np.random.RandomState(0)
    made = {}
    for path, shape in shapes.items():
        value = random.standard_normal(shape)
        if path.endswith("scale"):
            value = 1.0 + 0.2 * value
        else:
            value = value * (0.1 if path.endswith("bias") else 1.5 * shape[-2] ** -0.5)
        made[path] = value.astype(np.float32)
    return made


def input_ids() -> np.ndarray:
    """Tokens `[2, SEQ]`."""
    return np.random.RandomState(1).randint(0, VOCAB, (2, SEQ)).astype(np.int32)


def _per_layer(ours: dict[str, np.ndarray], names: dict[str, str], transpose: bool) -> Any:
    """Stacked weights as `(module, name, layer, value)` of the other library."""
    for path, stacked in ours.items():
        if not path.startswith("blocks/"):
            continue
        module, leaf = path.removeprefix("blocks/").rsplit("/", 1)
        for layer, value in enumerate(stacked):
            turned = value.T if transpose and leaf == "kernel" else value
            yield names[module], "bias" if leaf == "bias" else "weight", layer, turned


def gpt2_logits() -> np.ndarray:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=SEQ,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=INNER,
        )
    )
    ours = weights(GPT2_SHAPES)
    theirs = {
        "transformer.wte.weight": ours["wte"],
        "transformer.wpe.weight": ours["wpe"],
        "transformer.ln_f.weight": ours["ln_f/scale"],
        "transformer.ln_f.bias": ours["ln_f/bias"],
        "lm_head.weight": ours["wte"],
    }
    for module, leaf, layer, value in _per_layer(ours, _GPT2_NAMES, transpose=False):
        theirs[f"transformer.h.{layer}.{module}.{leaf}"] = value
    return _logits(model, theirs)


def llama_logits(*, rope_theta: float, tie_embeddings: bool, scaling: Any) -> np.ndarray:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_theta": rope_theta, "rope_type": "llama3" if scaling else "default"}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=SEQ,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tie_embeddings,
            rope_parameters={**rope, **(scaling or {})},
        )
    )
    ours = weights(LLAMA_SHAPES)
    theirs = {
        "model.embed_tokens.weight": ours["embedding"],
        "model.norm.weight": ours["norm/scale"],
        "lm_head.weight": ours["embedding"] if tie_embeddings else ours["lm_head"].T,
    }
    for module, leaf, layer, value in _per_layer(ours, _LLAMA_NAMES, transpose=True):
        theirs[f"model.layers.{layer}.{module}.{leaf}"] = value
    return _logits(model, theirs)


def _logits(model: Any, state: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    tensors = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()}
    model.load_state_dict(tensors, strict=True)
    model.eval()
    with torch.no_grad():
        return model(torch.tensor(input_ids()).long()).logits.numpy()


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    np.savez_compressed(REFERENCE / "gpt2.npz", logits=gpt2_logits())
    for name, variant in LLAMA_VARIANTS.items():
        np.savez_compressed(REFERENCE / f"{name}.npz", logits=llama_logits(**variant))


if __name__ == "__main__":
    main()

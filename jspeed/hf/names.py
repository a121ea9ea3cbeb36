"""What each parameter of a family is called in Hugging Face's files, as data that is read both
ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LAYER = "{layer}"


@dataclass(frozen=True)
class Entry:
    """One parameter of ours, and the tensors that hold it.

    Ours stacks the layers in its first dimension where a name has `{layer}`. What is left is
    `[inputs, outputs]`, `[outputs]`, or with parts `[inputs, parts, outputs]`, `[parts, outputs]`.

    Attributes:
      ours: the parameter's path.
      theirs: the tensors' names: one, or one for each part.
      transposed: theirs are `[outputs, inputs]`, as torch's Linear has them.
      fused: how many parts one tensor holds side by side in its last dimension.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    fused: int = 1

    @property
    def stacked(self) -> bool:
        return LAYER in self.theirs[0]

    @property
    def parts(self) -> int:
        """How many parts the parameter has; 1 is none, without a dimension for them."""
        return max(self.fused, len(self.theirs))

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor of a parameter `shape`."""
        rest = shape[1:] if self.stacked else shape
        if self.parts > 1:
            rest = (*rest[:-2], rest[-1] * self.fused)
        return rest[::-1] if self.transposed else rest


@dataclass(frozen=True)
class NameMap:
    """The names of a family.

    Attributes:
      entries: of all parameters that the family can have; a model has some of them.
      prefix: of the body, which files of the body alone leave out.
      tied: names that stand for another tensor where the model ties the two.
      ignored: regexes of names that hold no parameter of ours: buffers, and heads that jspeed
        does not have.
      renamed: endings of old files, and what they are now.
    """

    entries: tuple[Entry, ...]
    prefix: str
    tied: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] | None = None


def _one(ours: str, theirs: str, *, transposed: bool = False, fused: int = 1) -> Entry:
    return Entry(ours, (theirs,), transposed, fused)


def _linear(ours: str, theirs: str) -> tuple[Entry, ...]:
    """A layer of torch's Linear; without a bias the second entry is not used."""
    return (
        _one(f"{ours}/kernel", f"{theirs}.weight", transposed=True),
        _one(f"{ours}/bias", f"{theirs}.bias"),
    )


def _conv1d(ours: str, theirs: str, *, fused: int = 1) -> tuple[Entry, ...]:
    """A layer of GPT-2's own Conv1D, whose weight is `[inputs, outputs]`."""
    return (
        _one(f"{ours}/kernel", f"{theirs}.weight", fused=fused),
        _one(f"{ours}/bias", f"{theirs}.bias", fused=fused),
    )


def _layer_norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    return (
        _one(f"{ours}/scale", f"{theirs}.weight"),
        _one(f"{ours}/bias", f"{theirs}.bias"),
    )


_GPT2_LAYER = "transformer.h.{layer}"
_GPT2 = NameMap(
    entries=(
        _one("wte", "transformer.wte.weight"),
        _one("wpe", "transformer.wpe.weight"),
        *_layer_norm("blocks/ln_1", f"{_GPT2_LAYER}.ln_1"),
        *_conv1d("blocks/attn/qkv", f"{_GPT2_LAYER}.attn.c_attn", fused=3),
        *_conv1d("blocks/attn/proj", f"{_GPT2_LAYER}.attn.c_proj"),
        *_layer_norm("blocks/ln_2", f"{_GPT2_LAYER}.ln_2"),
        *_conv1d("blocks/mlp/fc", f"{_GPT2_LAYER}.mlp.c_fc"),
        *_conv1d("blocks/mlp/proj", f"{_GPT2_LAYER}.mlp.c_proj"),
        *_layer_norm("ln_f", "transformer.ln_f"),
        _one("lm_head", "lm_head.weight", transposed=True),
    ),
    prefix="transformer.",
    tied={"lm_head.weight": "transformer.wte.weight"},
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)

_LLAMA_LAYER = "model.layers.{layer}"
_LLAMA = NameMap(
    entries=(
        _one("embedding", "model.embed_tokens.weight"),
        _one("blocks/attention_norm/scale", f"{_LLAMA_LAYER}.input_layernorm.weight"),
        *_linear("blocks/attn/q", f"{_LLAMA_LAYER}.self_attn.q_proj"),
        *_linear("blocks/attn/k", f"{_LLAMA_LAYER}.self_attn.k_proj"),
        *_linear("blocks/attn/v", f"{_LLAMA_LAYER}.self_attn.v_proj"),
        *_linear("blocks/attn/o", f"{_LLAMA_LAYER}.self_attn.o_proj"),
        _one("blocks/attn/q_norm/scale", f"{_LLAMA_LAYER}.self_attn.q_norm.weight"),
        _one("blocks/attn/k_norm/scale", f"{_LLAMA_LAYER}.self_attn.k_norm.weight"),
        _one("blocks/mlp_norm/scale", f"{_LLAMA_LAYER}.post_attention_layernorm.weight"),
        *_linear("blocks/mlp/gate", f"{_LLAMA_LAYER}.mlp.gate_proj"),
        *_linear("blocks/mlp/up", f"{_LLAMA_LAYER}.mlp.up_proj"),
        *_linear("blocks/mlp/down", f"{_LLAMA_LAYER}.mlp.down_proj"),
        _one("norm/scale", "model.norm.weight"),
        _one("lm_head", "lm_head.weight", transposed=True),
    ),
    prefix="model.",
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)

_BERT_LAYER = "bert.encoder.layer.{layer}"
_BERT_QKV = tuple(f"{_BERT_LAYER}.attention.self.{name}" for name in ("query", "key", "value"))
_BERT_HEAD = "cls.predictions"
_BERT = NameMap(
    entries=(
        _one("wte", "bert.embeddings.word_embeddings.weight"),
        _one("wpe", "bert.embeddings.position_embeddings.weight"),
        _one("wtt", "bert.embeddings.token_type_embeddings.weight"),
        *_layer_norm("ln_embed", "bert.embeddings.LayerNorm"),
        Entry("blocks/attn/qkv/kernel", tuple(f"{name}.weight" for name in _BERT_QKV), True),
        Entry("blocks/attn/qkv/bias", tuple(f"{name}.bias" for name in _BERT_QKV)),
        *_linear("blocks/attn/proj", f"{_BERT_LAYER}.attention.output.dense"),
        *_layer_norm("blocks/ln_1", f"{_BERT_LAYER}.attention.output.LayerNorm"),
        *_linear("blocks/mlp/fc", f"{_BERT_LAYER}.intermediate.dense"),
        *_linear("blocks/mlp/proj", f"{_BERT_LAYER}.output.dense"),
        *_layer_norm("blocks/ln_2", f"{_BERT_LAYER}.output.LayerNorm"),
        *_linear("transform", f"{_BERT_HEAD}.transform.dense"),
        *_layer_norm("ln_head", f"{_BERT_HEAD}.transform.LayerNorm"),
        _one("head_bias", f"{_BERT_HEAD}.bias"),
        _one("lm_head", f"{_BERT_HEAD}.decoder.weight", transposed=True),
    ),
    prefix="bert.",
    tied={
        f"{_BERT_HEAD}.decoder.weight": "bert.embeddings.word_embeddings.weight",
        f"{_BERT_HEAD}.decoder.bias": f"{_BERT_HEAD}.bias",
    },
    ignored=(
        r"bert\.embeddings\.position_ids",
        r"bert\.pooler\..*",
        r"cls\.seq_relationship\..*",
    ),
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)

NAMES: Mapping[str, NameMap] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "bert": _BERT,
}
"""By `model_type`, which is also the name of our family."""


def entries_of(family: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Our paths -> entries of a model of a family, in the order of the model's parameters.

    Args:
      family: its name.
      shapes: path -> shape of its parameters.
    """
    known = {entry.ours: entry for entry in NAMES[family].entries}
    return {path: known[path] for path in shapes}

"""jspeed's own sections (`mesh`, `model`, `data`, `run`, `cluster`; `sweep` has a file of its own)
and the aliases that lead into them."""

from jspeed.config.key import later, mapped, section
from jspeed.config.keys_attention import MODEL_ATTENTION_KEYS
from jspeed.config.keys_sweep import SWEEP_KEYS
from jspeed.config.kinds import (
    Bool,
    Int,
    ListOf,
    Number,
    Regex,
    ShardingRules,
    Text,
    choice,
    either,
)
from jspeed.config.model_families import MODEL_FAMILIES
from jspeed.config.remat import RematKind

_EXPERT = "expert parallelism is not built yet"
_COUNT = Int(1)

MESH_KEYS = section(
    "mesh",
    mapped("pipe", _COUNT, 1, "pipeline stages, over which the layers are split"),
    mapped("replica", _COUNT, 1, "copies of the ZeRO shards"),
    mapped("data", Int(-1), -1, "the axis ZeRO shards over; -1 takes all remaining devices"),
    later("expert", _COUNT, 1, _EXPERT),
    mapped("seq", _COUNT, 1, "sequence parallelism: how many devices share each sequence"),
    mapped("tensor", _COUNT, 1, "tensor parallelism: heads, inner width, vocabulary"),
    mapped("rules", ShardingRules(), [], "sharding rules by parameter path, the first match wins"),
)

TRAINABLE_KEYS = (
    mapped("trainable", ListOf(Regex(), single=True), None,
           "regexes of the parameters that are trained, by their whole path; null means all"),
)  # fmt: skip

ALIAS_KEYS = (
    mapped("pipeline_parallelism.num_stages", _COUNT, None, 'the number of pipeline stages',
           alias_of="mesh.pipe"),
    mapped("tensor_model_parallel_size", _COUNT, None, "the size of tensor parallelism",
           alias_of="mesh.tensor"),
    mapped("sequence_parallel_size", _COUNT, None, "the size of sequence parallelism",
           alias_of="mesh.seq"),
    mapped("data_parallel_size", _COUNT, None, "the size of data parallelism",
           alias_of="mesh.data"),
)  # fmt: skip

MODEL_KEYS = section(
    "model",
    mapped("hf", Text(filled=True), None,
           "a folder in Hugging Face's layout: family, sizes and first weights come from it"),
    mapped("family", choice(*MODEL_FAMILIES), None, "the architecture", required=True),
    mapped("layers", _COUNT, None, "the number of blocks", required=True),
    mapped("hidden_size", _COUNT, None, "the width of the residual stream", required=True),
    mapped("heads", _COUNT, None, "the number of query heads", required=True),
    mapped("kv_heads", _COUNT, None, "the number of key/value heads; null means heads"),
    mapped("head_dim", _COUNT, None, "the width of a head; null means hidden_size / heads"),
    mapped("intermediate_size", _COUNT, None, "the width of the MLP; null means the family's"),
    mapped("activation", choice("gelu_tanh", "gelu", "relu"), None,
           "of the MLP (gpt2, bert); null means gelu_tanh"),
    mapped("vocab_size", _COUNT, None, "rows of the embedding; null means the tokenizer's"),
    mapped("sequence_length", _COUNT, None, "the longest sequence", required=True),
    mapped("dropout", Number(0, below=1), 0.0, "dropout rate"),
    mapped("tie_embeddings", Bool(), None, "one table for input and output; null: the family's"),
    mapped("token_types", _COUNT, None, "kinds of tokens (bert); null means 2"),
    mapped("output_bias", Bool(), False, "the logits have a bias (bert)"),
    mapped("sliding_window", _COUNT, None,
           "tokens that a token sees, itself among them (not gpt2, bert); null: all before it"),
    mapped("rope_theta", Number(above=0), 10_000.0, "base of the rotary frequencies (llama)"),
    section(
        "rope_scaling",
        mapped("rope_type", choice("llama3"), "llama3", "the kind of scaling"),
        mapped("factor", Number(1), None, "how much longer contexts get", required=True),
        mapped("low_freq_factor", Number(above=0), 1.0, "below it wavelengths scale fully"),
        mapped("high_freq_factor", Number(above=0), 4.0, "above it wavelengths stay"),
        mapped("original_max_position_embeddings", _COUNT, None, "the context length before",
               required=True),
    ),
    mapped("norm_epsilon", Number(above=0), 1e-5, "epsilon of the normalisation layers"),
    mapped("remat", RematKind(), "none",
           "what the backward pass computes again, see rematerialisation.md"),
    mapped("attention.implementation", choice("auto", "xla", "cudnn", "cpu", "blockwise"), "auto",
           "which attention computes the same; auto picks by platform"),
    mapped("attention.sequence_parallel", choice("auto", "ulysses", "ring", "allgather"), "auto",
           "how attention sees a sequence that mesh.seq splits; auto is ulysses where heads allow"),
    section("attention", *MODEL_ATTENTION_KEYS),
    mapped("mlp_chunk_size", _COUNT, None,
           "tokens of a row whose MLP exists at once on a device; null: all"),
    mapped("sequence_sharding", Bool(), True,
           "mesh.tensor also splits the residual stream between blocks, along the sequence"),
    mapped("loss_chunk_size", _COUNT, None, "tokens whose logits exist at once; null: 64 MiB"),
)  # fmt: skip

DATA_KEYS = section(
    "data",
    mapped("source", Text(filled=True), "python-docs",
           "python-docs, golden, or the path of a file or folder"),
    mapped("format", choice("auto", "text", "jsonl", "tokens"), "auto", "how files are read"),
    mapped("text_key", Text(filled=True), "text", "the field of a JSONL line"),
    mapped("sequence_length", _COUNT, None, "tokens per row; null means the model's"),
    section(
        "tokenizer",
        mapped("kind", choice("bpe", "byte", "file"), "bpe",
               "trained on the data, bytes, or a tokenizer.json"),
        mapped("vocab_size", _COUNT, None,
               "the size of a trained vocabulary; null means 4096, or what the kind has"),
        mapped("path", Text(filled=True), None, "the tokenizer.json of kind file"),
    ),
    mapped("document_mask", Bool(), False, "packed documents do not see each other"),
    mapped("validation_fraction", Number(0, below=1), 0.05, "the share kept for evaluation"),
    mapped("shuffle", Bool(), True, "a new order every epoch"),
    mapped("seed", Int(0), None, "the seed of the order; null means run.seed"),
    mapped("dtype", choice("uint16", "uint32"), "uint16", "the integers of a raw token file"),
)  # fmt: skip

RUN_KEYS = section(
    "run",
    mapped("dir", Text(filled=True), None, "where metrics and checkpoints go", required=True),
    mapped("steps", Int(0), None, "optimizer steps in all", required=True),
    mapped("seed", Int(0, 2**32 - 1), 0, "the seed of parameters, dropout and data order"),
    mapped("evaluate_every", Int(0), 0, "steps between evaluations; 0 means none"),
    mapped("evaluate_batches", _COUNT, 8, "validation batches of one evaluation"),
    mapped("save_every", Int(0), 0, "steps between checkpoints; 0 means at the end only"),
    mapped("keep_checkpoints", _COUNT, None, "how many checkpoints stay; null means all"),
    mapped("log_every", _COUNT, 1, "steps between lines of the log"),
    mapped("compile_cache", Bool(), True, "XLA's persistent compilation cache"),
    section(
        "watchdog",
        mapped("factor", either(Int(0, 0), Number(1)), 10,
               "a part of a step is late after so many times its median; 0 switches it off"),
        mapped("minimum_seconds", Number(above=0), 60, "and after so many seconds at least"),
        mapped("end_after_seconds", Number(0), None,
               "end the run when it stays late for so long; null: never"),
    ),
    section(
        "anomalies",
        mapped("nonfinite", choice("continue", "skip", "stop", "roll_back"), None,
               "after a loss or gradient that is not finite; null: skip where fp16 or bf16 skip "
               "such a step, else stop"),
        mapped("spike", choice("continue", "skip", "stop", "roll_back"), "continue",
               "after a loss far above the last ones"),
        mapped("spike_factor", Number(above=0), 10,
               "a loss is a spike so many deviations above the median of the last ones"),
        mapped("spike_window", Int(8), 64, "how many of the last losses count"),
        mapped("max_roll_backs", _COUNT, 3, "the run stops when one more is due"),
        mapped("max_skipped_steps", _COUNT, 100,
               "the run stops after so many skipped steps in a row; null: never"),
    ),
)  # fmt: skip

CLUSTER_KEYS = section(
    "cluster",
    mapped("gpu", Text(filled=True), None, "what `jspeed plan` and `sweep` compile for: a target"),
    mapped("gpus", _COUNT, None, "how many of them; null: as many as the mesh names"),
    mapped("gpus_per_host", _COUNT, 8, "how many of them share a host"),
)

OWN_KEYS = (
    *MESH_KEYS,
    *TRAINABLE_KEYS,
    *MODEL_KEYS,
    *DATA_KEYS,
    *RUN_KEYS,
    *CLUSTER_KEYS,
    *SWEEP_KEYS,
    *ALIAS_KEYS,
)
OWN_SECTIONS = ("mesh", "model", "data", "run", "cluster", "sweep")

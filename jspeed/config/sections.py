"""The typed sections of a configuration, as the rest of jspeed reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jspeed.config.keys_attention import KEYS_OF_MODE
from jspeed.config.model_families import MODEL_FAMILIES, ModelFamily
from jspeed.config.remat import Budget, Remat

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """The batch sizes as written; `resolve_batch` completes them for a number of devices."""

    train_batch_size: int | None
    micro_batch_size: int | None
    gradient_accumulation_steps: int | None


@dataclass(frozen=True, slots=True)
class ElasticityConfig:
    """What `elasticity` may choose a batch size from; the keys of the section, as written."""

    max_train_batch_size: int
    micro_batch_sizes: tuple[int, ...]
    min_gpus: int
    max_gpus: int
    num_gpus_per_node: int
    model_parallel_size: int
    prefer_larger_batch: bool
    version: float


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The optimizer: DeepSpeed's `type` and `params`, with all defaults filled in."""

    type: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The learning-rate schedule: DeepSpeed's `type` and `params`, with all defaults filled in."""

    type: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LossScaleConfig:
    """The loss scale of fp16: fixed when `static` is a number, dynamic when it is None."""

    static: float | None
    initial_scale: float
    window: int
    hysteresis: int
    consecutive_hysteresis: bool
    min_scale: float


@dataclass(frozen=True, slots=True)
class PrecisionConfig:
    """The dtypes of the step; `loss_scale` is there for fp16 only."""

    compute_dtype: DType
    loss_scale: LossScaleConfig | None
    grad_accum_dtype: DType
    communication_dtype: DType | None
    check_grad_overflow: bool
    cast_inputs: bool


@dataclass(frozen=True, slots=True)
class OffloadOptimizerConfig:
    """Where the optimizer's state lives off the devices.

    `update` says what updates it, the host's cores or the devices, `ratio` is the share of the
    parameters that is, `buffer_count` the chunks of state from the disk that are in memory at a
    time, `chunk_size` the elements up to which one is.
    """

    device: Literal["cpu", "nvme"]
    update: Literal["host", "device"]
    ratio: float
    nvme_path: str | None
    buffer_count: int
    chunk_size: int


@dataclass(frozen=True, slots=True)
class OffloadParamConfig:
    """Where the layers' parameters live off the devices; on the disk, `buffer_count` layers of each
    are in memory at a time."""

    device: Literal["cpu", "nvme"]
    nvme_path: str | None
    buffer_count: int


@dataclass(frozen=True, slots=True)
class ZeroConfig:
    """The ZeRO stage and its sizes, all counted in elements; `mics_shard_size` -1 is off."""

    stage: int
    persistence_threshold: int
    model_persistence_threshold: int
    max_reuse_distance: int
    max_live_parameters: int
    overlap_comm: bool
    reduce_bucket_size: int
    allgather_bucket_size: int
    prefetch_bucket_size: int
    reduce_scatter: bool
    mics_shard_size: int
    gather_16bit_on_save: bool
    offload_optimizer: OffloadOptimizerConfig | None = None
    offload_param: OffloadParamConfig | None = None


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """Devices per mesh axis; `data` -1 takes all that remain.

    `rules` are pairs of a regex over parameter paths and one mesh axis or None per dimension.
    """

    pipe: int
    replica: int
    data: int
    expert: int
    seq: int
    tensor: int
    rules: tuple[tuple[str, tuple[str | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """The order in which pipeline stages work; how many there are is `MeshConfig.pipe`."""

    schedule: Literal["gpipe", "1f1b", "interleaved-1f1b", "zb-h1"]
    chunks: int
    partition: str


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """How `tensor` splits the layers whose parameters' paths begin as one of `patterns` says.

    `model_types` limits it to models whose `config.model_type` is among them; `fused` kernels hold
    several projections.
    """

    patterns: tuple[str, ...]
    partition_type: Literal["row", "column", "skip"] = "column"
    model_types: tuple[str, ...] = ()
    fused: bool = False


@dataclass(frozen=True, slots=True)
class TensorParallelConfig:
    """What AutoTP goes by for models that name none of their dimensions.

    `asked`: the section asks for it, so that it works beside sharding rules too.
    """

    layer_specs: tuple[LayerSpec, ...] = ()
    use_default_specs: bool = True
    preset_model: str | None = None
    asked: bool = False


@dataclass(frozen=True, slots=True)
class RopeScalingConfig:
    """llama3 scaling of the rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


Mode = Literal["fixed", "dense", "variable", "bigbird", "bslongformer", "local_sliding_window"]


@dataclass(frozen=True, slots=True)
class SparseAttentionConfig:
    """Which blocks of tokens see which, under DeepSpeed's names; lists are tuples.

    `seed` is that of random blocks. What a mode has no use for is at its default.
    """

    mode: Mode
    block: int = 16
    different_layout_per_head: bool = False
    num_local_blocks: int = 4
    num_global_blocks: int = 1
    attention: Literal["bidirectional", "unidirectional"] = "bidirectional"
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = 1
    num_random_blocks: int = 0
    local_window_blocks: tuple[int, ...] = (4,)
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    num_sliding_window_blocks: int = 3
    seed: int = 0

    def meant(self) -> dict[str, Any]:
        """The mode and the parameters that mean something to it."""
        return {name: getattr(self, name) for name in ("mode", *KEYS_OF_MODE[self.mode])}


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Which implementation computes attention, how it sees a sequence that is split, and which
    blocks of tokens see which; `auto` picks by platform and heads, None sees all."""

    implementation: Literal["auto", "xla", "cudnn", "cpu", "blockwise"]
    sequence_parallel: Literal["auto", "ulysses", "ring", "allgather"] = "auto"
    pattern: SparseAttentionConfig | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model of jspeed's own families; None leaves a value to the family or the tokenizer.

    `hf` is the folder that the first weights come from, or None.
    """

    hf: str | None
    family: Literal["gpt2", "llama", "mistral", "qwen2", "qwen3", "bert"]
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int | None
    head_dim: int | None
    intermediate_size: int | None
    activation: Literal["gelu_tanh", "gelu", "relu"] | None
    vocab_size: int | None
    sequence_length: int
    dropout: float
    tie_embeddings: bool | None
    token_types: int | None
    output_bias: bool
    sliding_window: int | None
    rope_theta: float
    rope_scaling: RopeScalingConfig | None
    norm_epsilon: float
    remat: Remat | Budget
    attention: AttentionConfig
    mlp_chunk_size: int | None
    sequence_sharding: bool
    loss_chunk_size: int | None

    @property
    def traits(self) -> ModelFamily:
        """What sets the family apart from the others."""
        return MODEL_FAMILIES[self.family]


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """How text becomes tokens; `vocab_size` None is that of the file."""

    kind: Literal["bpe", "byte", "file"]
    vocab_size: int | None
    path: str | None


@dataclass(frozen=True, slots=True)
class DataConfig:
    """The training data; `seed` None means the seed of the run."""

    source: str
    format: Literal["auto", "text", "jsonl", "tokens"]
    text_key: str
    sequence_length: int
    tokenizer: TokenizerConfig
    document_mask: bool
    validation_fraction: float
    shuffle: bool
    seed: int | None
    dtype: Literal["uint16", "uint32"]


@dataclass(frozen=True, slots=True)
class ActivationCheckpointingConfig:
    """DeepSpeed's activation checkpointing, which is understood but not built yet."""

    partition_activations: bool
    number_checkpoints: int | None
    contiguous_memory_optimization: bool
    synchronize_checkpoint_boundary: bool
    profile: bool
    cpu_checkpointing: bool

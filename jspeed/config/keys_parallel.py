"""DeepSpeed's parallelism and model-side sections."""

from jspeed.config.key import Auto, automatic, later, mapped, passive, refused, section
from jspeed.config.keys_attention import SPARSE_ATTENTION_KEYS
from jspeed.config.kinds import (
    Anything,
    Bool,
    Choice,
    Int,
    ListOf,
    Number,
    Text,
    choice,
    either,
)

_AUTOTP = (
    'AutoTP is not built yet; write sharding rules by hand: "mesh": {"tensor": N, "rules": []}'
)
_EXPERTS = "expert parallelism is not built yet"
_HYBRID = "the hybrid (train and generate) engine is not built yet"
_COMPILE = "XLA compiles every jspeed step, so this is a DeepSpeed compiler setting without object"
_AUTO = Choice(("auto",))
_COUNT = Int(0)

PIPELINE_KEYS = section(
    "pipeline",
    mapped("stages", either(_AUTO, Int(1)), "auto",
           "the size of mesh.pipe; auto: that of the mesh"),
    mapped("schedule", choice("gpipe", "1f1b", "interleaved-1f1b", "zb-h1"), "1f1b",
           "the order of forward and backward passes; jspeed schedule draws it"),
    mapped("chunks", Int(1), 1, "pieces of the model per stage, for interleaved-1f1b"),
    mapped("partition", Text(filled=True), "best",
           "layers per stage: uniform, parameters, or type:<regex>; best: the model's, or uniform"),
    automatic("seed_layers", Bool(), False,
              "each layer's initial values are the same whatever stage it is on"),
    later("activation_checkpoint_interval", _COUNT, 0,
          "not taken from the file yet; give it to jspeed.PipelineModule, or set model.remat"),
    automatic("pipe_partitioned", Bool(), True,
              "between stages, devices that hold the same activations send a part each"),
    automatic("grad_partitioned", Bool(), True, "gradients travel as activations do"),
    automatic("use_reentrant", Bool(), True, "a PyTorch setting without object"),
)  # fmt: skip

_INJECTION = "AutoTP changes no module, it places parameters; say what to split in layer_specs"
_GATHERS = "XLA gathers or reduces where the model needs it"

_SPEC = section(
    "partition_config.layer_specs[]",
    mapped("patterns", ListOf(Text(), single=True), None,
           "regexes for the beginning of a parameter's path, with / or . between names"),
    mapped("partition_type", choice("row", "column", "skip"), "column", "how they are split"),
    mapped("shape", Anything(), None,
           "the kernel holds several projections: split where they have a dimension of their own"),
    automatic("partition_dim", Int(), None,
              "partition_type says it: torch's dimension 0 is columns, 1 is rows"),
    mapped("model_types", ListOf(Text(), single=True), None,
           "the values of the model's config.model_type that the entry is for"),
    automatic("gather_output", Bool(), False, _GATHERS),
    automatic("grad_allreduce", Bool(), True, _GATHERS),
)  # fmt: skip
_PRESETS = choice("llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3")

TENSOR_PARALLEL_KEYS = section(
    "tensor_parallel",
    mapped("autotp_size", _COUNT, 0, 'the size of "mesh.tensor"; 0 and 1 leave it'),
    mapped("tp.tp_size", Int(1), 1, 'the size of "mesh.tensor"; 1 leaves it'),
    mapped("tensor_parallel.tp_size", Int(1), None, 'the long name of "tp.tp_size"',
           alias_of="tensor_parallel.tp.tp_size"),
    automatic("tensor_parallel.tp_grain_size", Int(1), None, 'the long name of "tp.tp_grain_size"',
              alias_of="tensor_parallel.tp.tp_grain_size"),
    automatic("tp.tp_grain_size", Int(1), 1,
              "parts are equal and heads are never cut, so there is nothing to align"),
    automatic("dtype", Text(), "fp16", "the compute dtype that fp16 or bf16 sets counts"),
    automatic("tp_overlap_comm", Bool(), False,
              "XLA schedules reductions; the overlap options of zero_optimization hold for all"),
    mapped("preset_model", _PRESETS, None, "whose names of layers AutoTP goes by first"),
    mapped("partition_config.use_default_specs", Bool(), True,
           "whether known names and shapes decide what layer_specs leave open"),
    _SPEC,
    automatic("keep_module_on_host", Bool(), False, "parameters are created in their shards"),
    automatic("vocab_parallel_lm_head", Bool(), None,
              "the head is split by its vocabulary, which needs no gathered logits"),
    automatic("vocab_parallel_ce_backend", choice("torch", "liger"), "torch",
              "jspeed.nn.linear_cross_entropy computes in chunks of tokens as Liger does"),
    refused("injection_policy_tuple", Anything(), None, _INJECTION, on="set"),
    refused("replace_with_kernel_inject", Bool(), False, _INJECTION),
    refused("kernel_inject", Bool(), False, _INJECTION),
    auto=Auto.DEFAULT,
)  # fmt: skip

_MAYBE_AUTO_INT = either(_AUTO, Int(1))
_EP_PRESETS = choice("mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3")

EXPERT_PARALLEL_KEYS = section(
    "expert_parallel",
    later("enabled", Bool(), False, _EXPERTS),
    passive(
        later("autoep_size", Int(1), 1, _EXPERTS),
        later("expert_tensor_parallel_size", Int(1, 1), 1, _EXPERTS),
        later("preset_model", _EP_PRESETS, None, _EXPERTS),
        later("moe_layer_pattern", Text(), None, _EXPERTS),
        later("router_pattern", Text(), None, _EXPERTS),
        later("expert_pattern", Text(), None, _EXPERTS),
        later("use_grouped_mm", Bool(), True, _EXPERTS),
        later("disable_triton_grouped_mm", Bool(), False, _EXPERTS),
        later("route_norm", Bool(), None, _EXPERTS),
        later("route_scale", Number(), 1.0, _EXPERTS),
        later("score_func", choice("auto", "softmax", "sigmoid"), "auto", _EXPERTS),
        later("score_apply", choice("auto", "pre", "post"), "auto", _EXPERTS),
        later("top_k", _MAYBE_AUTO_INT, "auto", _EXPERTS),
        later("combine_impl", Text(), "auto", _EXPERTS),
        later("num_expert_groups", Int(1), None, _EXPERTS),
        later("num_limited_groups", Int(1), None, _EXPERTS),
        later("load_balance_coeff", Number(), None, _EXPERTS),
        later("routed_scaling_factor", either(_AUTO, Number()), "auto", _EXPERTS),
        later("expert_w1", Text(), None, _EXPERTS),
        later("expert_w2", Text(), None, _EXPERTS),
        later("expert_w3", Text(), None, _EXPERTS),
        later("expert_activation", Text(), None, _EXPERTS),
        later("num_experts_attr", Text(), None, _EXPERTS),
        later("top_k_attr", Text(), None, _EXPERTS),
        later("has_shared_experts", Bool(), None, _EXPERTS),
        later("shared_experts_pattern", Text(), None, _EXPERTS),
        later("shared_experts_gate_pattern", Text(), None, _EXPERTS),
        later("validate_folding_routing", Bool(), False, _EXPERTS),
        later("async_split_plan", Bool(), False, _EXPERTS),
        later("row_weighting_impl", Text(), "auto", _EXPERTS),
        later("gate_up_impl", Text(), "separate", _EXPERTS),
        later("comm_backend", Text(), "comm", _EXPERTS),
        later("comm_num_sm", _COUNT, 12, _EXPERTS),
        later("comm_qp_margin", _COUNT, 4, _EXPERTS),
        later("comm_max_tokens_per_rank", _COUNT, 0, _EXPERTS),
    ),
)

HYBRID_ENGINE_KEYS = section(
    "hybrid_engine",
    later("enabled", Bool(), False, _HYBRID),
    passive(
        later("max_out_tokens", Int(1), 512, _HYBRID),
        later("inference_tp_size", Int(1), 1, _HYBRID),
        later("release_inference_cache", Bool(), False, _HYBRID),
        later("pin_parameters", Bool(), True, _HYBRID),
        later("tp_gather_partition_size", Int(1), 8, _HYBRID),
        later("enable_cuda_graph", Bool(), False, _HYBRID),
    ),
    auto=Auto.DEFAULT,
)

_ACT_OFFLOAD = 'not taken from here: set "model.remat" with "offload"'
_STATE_OFFLOAD = 'not taken from here: set "zero_optimization.offload_optimizer", "offload_param"'

COMPILE_KEYS = section(
    "compile",
    automatic("deepcompile", Bool(), False, "XLA compiles the whole step in every run"),
    automatic("free_activation", Bool(), False, "XLA frees each buffer after its last use"),
    automatic("free_activation_threshold", _COUNT, 10 * 2**20, _COMPILE),
    later("offload_activation", Bool(), False, _ACT_OFFLOAD),
    passive(later("offload_activation_pin_memory", Bool(), True, _ACT_OFFLOAD)),
    later("offload_opt_states", Bool(), False, _STATE_OFFLOAD),
    later("offload_parameters", Bool(), False, _STATE_OFFLOAD),
    automatic("autoep_non_moe", Bool(), False, _COMPILE),
    automatic("double_buffer", Bool(), True, _COMPILE),
    automatic("symmetric_memory", Bool(), False, _COMPILE),
    automatic("debug_log", Bool(), False, "XLA_FLAGS=--xla_dump_to=DIR writes every program"),
    automatic("sync_before_reduce", Bool(), False, _COMPILE),
    automatic("sync_after_reduce", Bool(), False, _COMPILE),
    automatic("sync_before_allgather", Bool(), False, _COMPILE),
    automatic("sync_after_allgather", Bool(), False, _COMPILE),
    automatic("keep_int_input_tensors", Bool(), True, _COMPILE),
    automatic("keep_all_input_tensors", Bool(), False, _COMPILE),
    later(
        "passes",
        ListOf(choice("z1", "z3", "autosp", "autotp")),
        None,
        "autosp and autotp are not built yet; z1 and z3 are what XLA does anyway",
        off=([], ["z1"], ["z3"]),
    ),
    auto=Auto.DEFAULT,
)

ACTIVATION_CHECKPOINTING_KEYS = section(
    "activation_checkpointing",
    mapped(
        "partition_activations",
        Bool(),
        False,
        "what layers keep is split over mesh.tensor: model.sequence_sharding, which is on",
    ),
    mapped(
        "number_checkpoints",
        Int(1),
        None,
        "model.remat with so many checkpoints, of equal groups of layers",
    ),
    automatic(
        "contiguous_memory_optimization",
        Bool(),
        False,
        "what layers keep is one array for all of them, allocated before the step",
    ),
    refused(
        "synchronize_checkpoint_boundary",
        Bool(),
        False,
        "a step is one program, in which there is no boundary to wait at; leave it out",
    ),
    refused(
        "profile",
        Bool(),
        False,
        "a step is one program; `jspeed plan` shows what recomputation costs in it, and "
        "jax.profiler how long each part takes",
    ),
    mapped(
        "cpu_checkpointing",
        Bool(),
        False,
        "model.remat with the inputs of layers in the host's pinned memory",
    ),
)

_ORDER = "one fixed order of mesh axes, slowest network first, holds for every layout"

PARALLEL_KEYS = (
    *PIPELINE_KEYS,
    *TENSOR_PARALLEL_KEYS,
    *EXPERT_PARALLEL_KEYS,
    *SPARSE_ATTENTION_KEYS,
    *HYBRID_ENGINE_KEYS,
    *COMPILE_KEYS,
    *ACTIVATION_CHECKPOINTING_KEYS,
    automatic("use_data_before_expert_parallelism", Bool(), False, _ORDER),
    automatic(
        "graph_harvesting",
        Bool(),
        False,
        "the whole step is one XLA program, captured in CUDA graphs where XLA finds it faster",
    ),
    automatic(
        "vocabulary_size",
        Int(1),
        None,
        "only makes DeepSpeed warn when it is not a multiple of 8; the model's own size counts",
    ),
)

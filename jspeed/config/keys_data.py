"""DeepSpeed's data efficiency, curriculum and compression sections."""

from jspeed.config.key import Key, later, passive, section
from jspeed.config.kinds import Anything, Bool, Int, ListOf, Number, Object, Text, choice

_CURRICULUM = "curriculum learning is not built yet"
_SAMPLING = "data sampling by difficulty is not built yet"
_BATCHING = "dynamic batching is not built yet"
_LTD = "random layer-token dropping is not built yet"
_PLD = "progressive layer drop is not built yet"
_COMPRESS = "compression (pruning, quantisation-aware training, layer reduction) is not built yet"
_MOQ = "mixture of quantisation is not built yet"
_COUNT = Int(0)
_SHARE = Number(0, 1)
_SCHEDULE = choice("fixed_linear", "fixed_root", "fixed_discrete", "custom")


def _difficulty(reason: str) -> tuple[Key, ...]:
    """The schedule keys that both curriculum sections share."""
    return (
        later("min_difficulty", _COUNT, None, reason),
        later("max_difficulty", _COUNT, None, reason),
        later("schedule_type", _SCHEDULE, None, reason),
        *section(
            "schedule_config",
            later("total_curriculum_step", Int(1), None, reason),
            later("difficulty_step", Int(1), None, reason),
            later("root_degree", Number(above=0), None, reason),
            later("difficulty", ListOf(_COUNT), None, reason),
            later("max_step", ListOf(_COUNT), None, reason),
        ),
    )


CURRICULUM_KEYS = section(
    "curriculum_learning",
    later("enabled", Bool(), False, _CURRICULUM),
    passive(later("curriculum_type", Text(), None, _CURRICULUM), _difficulty(_CURRICULUM)),
)

_METRIC = section(
    "curriculum_metrics.*",
    later("index_to_sample_path", Text(), None, _SAMPLING),
    later("index_to_metric_path", Text(), None, _SAMPLING),
    later("difficulty_type", choice("value", "percentile"), None, _SAMPLING),
    later("clustering_type", choice("single_cluster", "schedule_based"), None, _SAMPLING),
    _difficulty(_SAMPLING),
)

DATA_SAMPLING_KEYS = section(
    "data_sampling",
    later("enabled", Bool(), False, _SAMPLING, on="never"),
    passive(
        later("num_epochs", Int(1), 1000, _SAMPLING),
        later("num_workers", _COUNT, 0, _SAMPLING),
        later("pin_memory", Bool(), False, _SAMPLING),
        section(
            "curriculum_learning",
            later("enabled", Bool(), False, _SAMPLING),
            later("data_cluster_path", Text(), None, _SAMPLING),
            _METRIC,
        ),
        section(
            "dynamic_batching",
            later("enabled", Bool(), False, _BATCHING),
            later("lr_scaling_method", choice("linear", "sqrt", "none"), "linear", _BATCHING),
            later("min_batch_size", Int(1), 1, _BATCHING),
            later("max_batch_size", Int(1), None, _BATCHING),
            later("sequence_picking_order", choice("dataloader", "random", "seqlen"),
                  "dataloader", _BATCHING),
            later("max_tokens", Int(1), None, _BATCHING),
            later("metrics_path", Text(), None, _BATCHING),
            later("verbose", Bool(), False, _BATCHING),
        ),
    ),
)  # fmt: skip

_LTD_SCHEDULE = section(
    "random_ltd_schedule",
    later("min_value", _COUNT, None, _LTD),
    later("max_value", _COUNT, None, _LTD),
    later("schedule_type", choice("fixed_linear"), "fixed_linear", _LTD),
    later("schedule_config.require_steps", Int(1), None, _LTD),
    later("schedule_config.seq_per_step", Int(1), None, _LTD),
)

DATA_ROUTING_KEYS = section(
    "data_routing",
    passive(
        later("enabled", Bool(), False, _LTD),
        section(
            "random_ltd",
            later("enabled", Bool(), False, _LTD),
            later("total_layer_num", Int(1), None, _LTD),
            later("random_ltd_layer_num", Int(1), None, _LTD),
            later("random_ltd_layer_id", ListOf(_COUNT), None, _LTD),
            later("model_mask_name", Text(), None, _LTD),
            later("model_type", choice("encoder", "decoder"), None, _LTD),
            later("hidden_state_order", Text(), None, _LTD),
            later("micro_batch_size", Int(1), None, _LTD),
            later("global_batch_size", Int(1), None, _LTD),
            _LTD_SCHEDULE,
            section(
                "layer_token_lr_schedule",
                later("enabled", Bool(), False, _LTD),
                later("total_layer_tokens", Int(1), None, _LTD),
                later("warmup_type", Text(), None, _LTD),
                later("warmup_layer_tokens", Int(1), None, _LTD),
            ),
        ),
    ),
)

DATA_EFFICIENCY_KEYS = section(
    "data_efficiency",
    later("enabled", Bool(), False, "DeepSpeed's data efficiency library is not built yet"),
    passive(later("seed", _COUNT, 1234, _SAMPLING)),
    DATA_SAMPLING_KEYS,
    DATA_ROUTING_KEYS,
)

_PATTERNS = ListOf(Text(), single=True)
_SYMMETRY = choice("symmetric", "asymmetric")


def _technique(name: str, shared: tuple[Key, ...], params: tuple[Key, ...]) -> tuple[Key, ...]:
    """One compression technique: its shared parameters and its groups of modules."""
    return section(
        name,
        later("shared_parameters.enabled", Bool(), False, _COMPRESS),
        passive(
            section("shared_parameters", shared),
            section(
                "different_groups.*",
                section("params", params),
                later("modules", _PATTERNS, None, _COMPRESS),
                later("related_modules", Anything(), None, _COMPRESS),
            ),
        ),
    )


_OFFSETS = (
    later("schedule_offset", _COUNT, 1000, _COMPRESS),
    later("schedule_offset_end", _COUNT, None, _COMPRESS),
)
_RATIO = (later("dense_ratio", _SHARE, None, _COMPRESS),)
_L1 = later("method", choice("l1", "topk"), "l1", _COMPRESS)

COMPRESSION_KEYS = section(
    "compression_training",
    _technique("weight_quantization", (
        later("quantizer_kernel", Bool(), False, _COMPRESS),
        later("schedule_offset", _COUNT, 0, _COMPRESS),
        later("quantize_groups", Int(1), 1, _COMPRESS),
        later("quantize_verbose", Bool(), False, _COMPRESS),
        later("quantization_type", _SYMMETRY, "symmetric", _COMPRESS),
        later("rounding", choice("nearest", "stochastic"), "nearest", _COMPRESS),
        later("quantize_weight_in_forward", Bool(), False, _COMPRESS),
        later("fp16_mixed_quantize.enabled", Bool(), False, _COMPRESS),
        later("fp16_mixed_quantize.quantize_change_ratio", _SHARE, 0.001, _COMPRESS),
    ), (
        later("start_bits", Int(1), None, _COMPRESS),
        later("target_bits", Int(1), None, _COMPRESS),
        later("quantization_period", Int(1), 1, _COMPRESS),
    )),
    _technique("activation_quantization", (
        later("quantization_type", _SYMMETRY, "symmetric", _COMPRESS),
        later("range_calibration", choice("dynamic", "static"), "dynamic", _COMPRESS),
        later("schedule_offset", _COUNT, 1000, _COMPRESS),
    ), (later("bits", Int(1), None, _COMPRESS),)),
    _technique("sparse_pruning", (
        later("method", choice("l1", "topk", "snip_momentum"), "l1", _COMPRESS),
        *_OFFSETS,
        later("schedule_offset_stride", Int(1), 1, _COMPRESS),
        later("block_pattern", Text(), "4x1", _COMPRESS),
        later("dense_ratio", _SHARE, 0.1, _COMPRESS),
        later("excluded_modules", _PATTERNS, None, _COMPRESS),
    ), _RATIO),
    _technique("row_pruning", (_L1, *_OFFSETS), _RATIO),
    _technique("head_pruning", (
        later("method", choice("topk"), "topk", _COMPRESS),
        *_OFFSETS,
        later("num_heads", Int(1), None, _COMPRESS),
    ), _RATIO),
    _technique("channel_pruning", (_L1, *_OFFSETS), _RATIO),
    later("layer_reduction.enabled", Bool(), False, _COMPRESS),
    passive(section(
        "layer_reduction",
        later("keep_number_layer", Int(1), None, _COMPRESS),
        later("module_name_prefix", Text(), None, _COMPRESS),
        later("teacher_layer", ListOf(_COUNT), None, _COMPRESS),
        later("other_module_name", _PATTERNS, None, _COMPRESS),
    )),
)  # fmt: skip

_QUANT = "quantised weights are not built yet"
_GROUP = (
    later("num_bits", Int(4, 8), None, _QUANT),
    later("group_size", Int(1), None, _QUANT),
    later("group_dim", _COUNT, None, _QUANT),
    later("symmetric", Bool(), False, _QUANT),
)

WEIGHT_QUANTIZATION_KEYS = section(
    "weight_quantization",
    later("", Object(), None, _QUANT, on="set"),
    passive(
        section("quantized_initialization", _GROUP),
        section("post_init_quant.*", _GROUP),
    ),
)

PROGRESSIVE_LAYER_DROP_KEYS = section(
    "progressive_layer_drop",
    later("enabled", Bool(), False, _PLD),
    passive(later("theta", _SHARE, 1.0, _PLD), later("gamma", Number(), 0.001, _PLD)),
)

QUANTIZE_TRAINING_KEYS = section(
    "quantize_training",
    later("enabled", Bool(), False, _MOQ),
    passive(later("*", Anything(), None, _MOQ)),
)

EIGENVALUE_KEYS = section(
    "eigenvalue",
    later("enabled", Bool(), False, _MOQ),
    passive(
        later("verbose", Bool(), False, _MOQ),
        later("max_iter", Int(1), 100, _MOQ),
        later("tol", Number(above=0), 1e-2, _MOQ),
        later("stability", Number(0), 1e-6, _MOQ),
        later("gas_boundary_resolution", Int(1), 1, _MOQ),
        later("layer_name", Text(), "bert.encoder.layer", _MOQ),
        later("layer_num", _COUNT, 0, _MOQ),
    ),
)

DATA_SECTION_KEYS = (
    *CURRICULUM_KEYS,
    *DATA_EFFICIENCY_KEYS,
    *COMPRESSION_KEYS,
    *WEIGHT_QUANTIZATION_KEYS,
    *PROGRESSIVE_LAYER_DROP_KEYS,
    *QUANTIZE_TRAINING_KEYS,
    *EIGENVALUE_KEYS,
)

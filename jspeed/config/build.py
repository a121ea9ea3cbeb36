"""From values by path to the typed sections."""

from dataclasses import replace
from typing import Any

from jspeed.config import elastic_rules, patterns, remat_rules
from jspeed.config import sections as types
from jspeed.config import sections_run as of_runs
from jspeed.config.batch import ACCUMULATION, MICRO, TRAIN
from jspeed.config.check import Entry, Source
from jspeed.config.key import LATER, MAPPED
from jspeed.config.keys import KEYS
from jspeed.config.keys_optimizer import OPTIMIZERS, SCHEDULERS, Family, find_family
from jspeed.config.values import Values

_ZERO = "zero_optimization"
BYTE_VOCABULARY = 257
_DTYPES: dict[str, types.DType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def derive(values: Values) -> Values:
    """Return `values` with the defaults filled in that depend on other keys."""
    given = dict(values.given)

    def put(path: str, value: Any, note: str, *, only_if: bool = True) -> None:
        if only_if and not values.is_given(path):
            entry = given.get(path)
            base = entry or Entry(KEYS[path], None, Source.DEFAULT)
            given[path] = replace(base, value=value, note=note, pending=False)

    stage = values.get(f"{_ZERO}.stage")
    put(f"{_ZERO}.overlap_comm", stage == 3, f"stage {stage}")
    stages = values.get("pipeline.stages")
    put("mesh.pipe", stages, "from pipeline.stages", only_if=stages != "auto")
    path, tensor = autotp_size(values)
    put("mesh.tensor", tensor, f'from "{path}"', only_if=tensor > 1)
    for name in patterns.undecided_attention(values):
        put(name, "unidirectional", f"{values.get('model.family')} is a decoder")
    longest = values.get("model.sequence_length")
    put("data.sequence_length", longest, "from model.sequence_length",
        only_if=values.has_section("data") and longest is not None)  # fmt: skip
    kind, has_data = values.get("data.tokenizer.kind"), values.has_section("data")
    put("data.tokenizer.vocab_size", BYTE_VOCABULARY, "256 bytes and a separator",
        only_if=has_data and kind == "byte")  # fmt: skip
    put("data.tokenizer.vocab_size", 4096, "", only_if=has_data and kind == "bpe")
    for name, families in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        entry = given.get(f"{name}.type")
        if entry is None or entry.value is None:
            continue
        family = find_family(families, entry.value)
        if family is not None:
            given[f"{name}.type"] = replace(entry, value=family.name)
    return elastic_rules.derive(replace(values, given=given))


def params_of(values: Values, name: str, family: Family) -> dict[str, Any]:
    """Return the parameters that count for the mathematics, given or default, by their names."""
    params: dict[str, Any] = {}
    for key in family.params:
        if key.treatment is MAPPED or (key.treatment is LATER and family.treatment is LATER):
            entry = values.given.get(f"{name}.params.{key.path}")
            known = entry is not None and not entry.pending
            params[key.path] = entry.value if entry is not None and known else key.default
    return params


def optimizer(values: Values) -> types.OptimizerConfig | None:
    """Return the optimizer, or None when none is configured."""
    if not values.is_given("optimizer.type"):
        return None
    family = find_family(OPTIMIZERS, values.get("optimizer.type"))
    assert family is not None
    params = params_of(values, "optimizer", family)
    prefix = "optimizer.params"
    if family.name == "Muon":
        shared = params["lr"] if values.is_given(f"{prefix}.lr") else None
        params["muon_lr"] = _first(params["muon_lr"], params["lr"])
        params["adam_lr"] = _first(params["adam_lr"], shared, 3e-4)
    # Muon has an Adam of its own.
    torch_adam = family.name != "Muon" and values.given.get(f"{prefix}.torch_adam")
    decoupled = family.name == "AdamW" or params.get("adam_w_mode")
    undecayed = "weight_decay" in params and not values.is_given(f"{prefix}.weight_decay")
    if torch_adam and torch_adam.value and decoupled and undecayed:
        # `torch_adam` chooses torch.optim.AdamW, whose default is 0.01; DeepSpeed's own kernels
        # default to no decay.
        params["weight_decay"] = 0.01
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    return types.OptimizerConfig(family.name, params)


def _first(*candidates: float | None) -> float:
    return next(value for value in candidates if value is not None)


def scheduler(values: Values) -> types.SchedulerConfig | None:
    """Return the learning-rate schedule, or None when none is configured."""
    if not values.is_given("scheduler.type"):
        return None
    family = find_family(SCHEDULERS, values.get("scheduler.type"))
    assert family is not None
    params = {
        name: value[0] if isinstance(value, list) else value
        for name, value in params_of(values, "scheduler", family).items()
    }
    if "warmup_num_steps" in params:
        # DeepSpeed's least: the logarithmic warm-up divides by its logarithm. So 0, which Hugging
        # Face's integration fills in where no warm-up is asked for, means the shortest one.
        params["warmup_num_steps"] = max(2, params["warmup_num_steps"])
    return types.SchedulerConfig(family.name, params)


def precision(values: Values) -> types.PrecisionConfig:
    """Return the dtypes of the step."""
    fp16, bf16 = values.get("fp16.enabled"), values.get("bf16.enabled")
    accumulator = values.get("data_types.grad_accum_dtype")
    wire = values.get("communication_data_type")
    return types.PrecisionConfig(
        compute_dtype="float16" if fp16 else "bfloat16" if bf16 else "float32",
        loss_scale=_loss_scale(values) if fp16 else None,
        grad_accum_dtype=_DTYPES[accumulator or "fp32"],
        communication_dtype=_DTYPES[wire] if wire is not None else None,
        check_grad_overflow=fp16 or (bf16 and values.get("bf16.check_grad_overflow")),
        cast_inputs=fp16 and values.get("fp16.auto_cast"),
    )


def _loss_scale(values: Values) -> types.LossScaleConfig:
    static = values.get("fp16.loss_scale")
    return types.LossScaleConfig(
        static=static if static != 0 else None,
        initial_scale=2.0 ** values.get("fp16.initial_scale_power"),
        window=values.get("fp16.loss_scale_window"),
        hysteresis=values.get("fp16.hysteresis"),
        consecutive_hysteresis=values.get("fp16.consecutive_hysteresis"),
        min_scale=values.get("fp16.min_loss_scale"),
    )


def batch(values: Values) -> types.BatchConfig:
    """Return the batch sizes as written."""
    return types.BatchConfig(values.get(TRAIN), values.get(MICRO), values.get(ACCUMULATION))


def zero(values: Values) -> types.ZeroConfig:
    """Return the ZeRO section with its defaults."""

    def get(name: str) -> Any:
        return values.get(f"{_ZERO}.{name}")

    return types.ZeroConfig(
        stage=get("stage"),
        persistence_threshold=get("stage3_param_persistence_threshold"),
        model_persistence_threshold=get("stage3_model_persistence_threshold"),
        max_reuse_distance=get("stage3_max_reuse_distance"),
        max_live_parameters=get("stage3_max_live_parameters"),
        overlap_comm=get("overlap_comm"),
        reduce_bucket_size=get("reduce_bucket_size"),
        allgather_bucket_size=get("allgather_bucket_size"),
        prefetch_bucket_size=get("stage3_prefetch_bucket_size"),
        reduce_scatter=get("reduce_scatter"),
        mics_shard_size=get("mics_shard_size"),
        gather_16bit_on_save=get("stage3_gather_16bit_weights_on_model_save"),
        offload_optimizer=_offload_optimizer(values),
        offload_param=_offload_param(values),
    )


def _offload_param(values: Values) -> types.OffloadParamConfig | None:
    def get(name: str) -> Any:
        return values.get(f"{_ZERO}.offload_param.{name}")

    if get("device") == "none":
        return None
    return types.OffloadParamConfig(get("device"), get("nvme_path"), get("buffer_count"))


def _offload_optimizer(values: Values) -> types.OffloadOptimizerConfig | None:
    def get(name: str) -> Any:
        return values.get(f"{_ZERO}.offload_optimizer.{name}")

    if get("device") == "none":
        return None
    return types.OffloadOptimizerConfig(
        device=get("device"),
        update=get("update"),
        ratio=get("ratio"),
        nvme_path=get("nvme_path"),
        buffer_count=get("buffer_count"),
        chunk_size=values.get(f"{_ZERO}.sub_group_size"),
    )


def trainable(values: Values) -> tuple[str, ...] | None:
    """Return the regexes of the parameters that are trained, or None for all."""
    patterns = values.get("trainable")
    return None if patterns is None else tuple(patterns)


def mesh(values: Values) -> types.MeshConfig:
    """Return the mesh, with sharding rules as tuples."""
    fields = _fields(values, "mesh", types.MeshConfig)
    fields["rules"] = tuple((pattern, tuple(axes)) for pattern, axes in fields["rules"])
    return types.MeshConfig(**fields)


def pipeline(values: Values) -> types.PipelineConfig:
    """Return the pipeline section with its defaults."""
    return types.PipelineConfig(**_fields(values, "pipeline", types.PipelineConfig))


def tensor_parallel(values: Values) -> types.TensorParallelConfig:
    """Return what AutoTP goes by."""
    section = "tensor_parallel"
    specs = values.patterned.get(f"{section}.partition_config.layer_specs") or []
    preset = values.get(f"{section}.preset_model")
    return types.TensorParallelConfig(
        layer_specs=tuple(map(_layer_spec, specs)),
        use_default_specs=values.get(f"{section}.partition_config.use_default_specs"),
        preset_model=preset,
        asked=bool(specs or preset) or autotp_size(values)[1] > 1,
    )


def _layer_spec(spec: dict[str, Any]) -> types.LayerSpec:
    def texts(name: str) -> tuple[str, ...]:
        given = spec.get(name) or ()
        return (given,) if isinstance(given, str) else tuple(given)

    kind = spec.get("partition_type", "column")
    kind = "column" if kind == "auto" else kind
    fused = spec.get("shape") not in (None, "auto")
    return types.LayerSpec(texts("patterns"), kind, texts("model_types"), fused)


def autotp_size(values: Values) -> tuple[str, int]:
    """Return the key of DeepSpeed's that asks for tensor parallelism, and the size; 1 for none."""
    for path in ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size"):
        if values.get(path) > 1:
            return path, values.get(path)
    return "", 1


def model(values: Values) -> types.ModelConfig | None:
    """Return the model section, or None when there is none."""
    if not values.has_section("model"):
        return None
    scaling = None
    if values.has_section("model.rope_scaling"):
        scaling = types.RopeScalingConfig(
            **_fields(values, "model.rope_scaling", types.RopeScalingConfig)
        )
    attention = types.AttentionConfig(
        **_fields(values, "model.attention", types.AttentionConfig, leave_out=("pattern",)),
        pattern=patterns.of_model(values),
    )
    apart = ("rope_scaling", "attention", "remat")
    fields = _fields(values, "model", types.ModelConfig, leave_out=apart)
    return types.ModelConfig(
        **fields, rope_scaling=scaling, attention=attention, remat=remat_rules.of_model(values)
    )


def data(values: Values) -> types.DataConfig | None:
    """Return the data section, or None when there is none."""
    if not values.has_section("data"):
        return None
    tokenizer = types.TokenizerConfig(**_fields(values, "data.tokenizer", types.TokenizerConfig))
    fields = _fields(values, "data", types.DataConfig, leave_out=("tokenizer",))
    return types.DataConfig(**fields, tokenizer=tokenizer)


def run(values: Values) -> of_runs.RunConfig | None:
    """Return the run section, or None when there is none."""
    if not values.has_section("run"):
        return None
    watchdog = of_runs.WatchdogConfig(**_fields(values, "run.watchdog", of_runs.WatchdogConfig))
    anomalies = of_runs.AnomaliesConfig(**_fields(values, "run.anomalies", of_runs.AnomaliesConfig))
    fields = _fields(values, "run", of_runs.RunConfig, leave_out=("watchdog", "anomalies"))
    return of_runs.RunConfig(**fields, watchdog=watchdog, anomalies=anomalies)


def cluster(values: Values) -> of_runs.ClusterConfig:
    """Return what the run is planned for."""
    return of_runs.ClusterConfig(**_fields(values, "cluster", of_runs.ClusterConfig))


def sweep(values: Values) -> of_runs.SweepConfig:
    """Return what a sweep tries; the defaults where there is no such section."""
    fields = _fields(values, "sweep", of_runs.SweepConfig)
    for name, value in fields.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    return of_runs.SweepConfig(**fields)


def monitor(values: Values, name: str) -> of_runs.MonitorConfig:
    """Return the section of one monitor."""
    names = [path.removeprefix(f"{name}.") for path in KEYS if path.startswith(f"{name}.")]
    return of_runs.MonitorConfig(**{key: values.get(f"{name}.{key}") for key in names})


def flops_profiler(values: Values) -> of_runs.FlopsProfilerConfig:
    """Return DeepSpeed's FLOPs profiler section."""
    section = of_runs.FlopsProfilerConfig
    return section(**_fields(values, "flops_profiler", section))


def comms_logger(values: Values) -> of_runs.CommsLoggerConfig:
    """Return DeepSpeed's communication logger section."""
    section = of_runs.CommsLoggerConfig
    fields = _fields(values, "comms_logger", section)
    return section(**{**fields, "prof_ops": tuple(fields["prof_ops"])})


def activation_checkpointing(values: Values) -> types.ActivationCheckpointingConfig:
    """Return DeepSpeed's activation checkpointing section."""
    section = types.ActivationCheckpointingConfig
    return section(**_fields(values, "activation_checkpointing", section))


def _fields(
    values: Values, section: str, record: type, *, leave_out: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the fields of the dataclass `record` from the keys of the same names."""
    names = [name for name in record.__dataclass_fields__ if name not in leave_out]
    return {name: values.get(f"{section}.{name}") for name in names}

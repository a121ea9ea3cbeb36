"""The keys of `zero_optimization`."""

import sys

from jspeed.config.key import Auto, Key, automatic, later, mapped, passive, refused, section
from jspeed.config.kinds import Bool, Choice, Int, ListOf, Number, Object, Text, choice, either

SIZE = Int(0)
DEVICE = choice("none", "cpu", "nvme")

_AS_LARGE = "buffers are as large as a layer of a parameter"
_SUPER = "SuperOffload's speculative updates are not built yet"
_STAGED = "transfers are staged and overlapped by themselves; there is nothing to set"
_ZEROPP = "ZeRO++ (quantised or hierarchical communication) is not built yet"
_ZENFLOW = "ZenFlow's updates of a part of the gradients are not built yet"
_PLACED = "XLA lays out buffers and schedules collectives by itself; there is nothing to set"
_HOOKS = "jspeed has no module hooks: weights are gathered where the program reads them"

STAGES = (
    mapped("stage", Int(0, 3), 0, "which of master, moments, grad and param are sharded"),
    automatic("reduce_scatter", Bool(), True,
              "sharded gradients are reduce-scattered; the result of false would be the same"),
    mapped("reduce_bucket_size", SIZE, 500_000_000,
           "elements up to which XLA combines reductions into one; 0: XLA decides",
           auto=Auto.FACTS),
    mapped("allgather_bucket_size", SIZE, 500_000_000,
           "elements up to which XLA combines the all-gathers of stages 1 and 2"),
    mapped("overlap_comm", either(Bool()), None,
           "runs collectives behind computation; null means at stage 3 only"),
    mapped("mics_shard_size", Int(-1), -1,
           "MiCS: shards over groups of this many devices and copies between them; -1 is off"),
)  # fmt: skip

STAGE3 = (
    automatic("stage3_max_live_parameters", SIZE, 1_000_000_000,
              "gathered weights are freed after their last use, within the device's memory"),
    automatic("stage3_max_reuse_distance", SIZE, 1_000_000_000,
              "a weight is freed after each use and gathered again for the backward pass"),
    mapped("stage3_prefetch_bucket_size", SIZE, 50_000_000,
           "elements up to which XLA combines the all-gathers of stage 3, ahead of use",
           auto=Auto.FACTS),
    mapped("stage3_param_persistence_threshold", SIZE, 100_000,
           "parameters with fewer elements stay whole on every device", auto=Auto.FACTS),
    mapped("stage3_model_persistence_threshold", SIZE, sys.maxsize,
           "the number of elements that may stay whole in all"),
    automatic("stage3_gather_16bit_weights_on_model_save", Bool(), False,
              "save_16bit_model gathers under every stage, whatever this says"),
)  # fmt: skip

AUTOMATIC = (
    automatic("contiguous_gradients", Bool(), True, _PLACED),
    automatic("use_multi_rank_bucket_allreduce", Bool(), True, _PLACED),
    automatic("allgather_partitions", Bool(), True, _PLACED),
    automatic("round_robin_gradients", Bool(), False, _PLACED),
    mapped("sub_group_size", Int(1), 1_000_000_000,
           "elements up to which an offloaded optimizer takes state at a time, at most 8388608"),
    automatic("ignore_unused_parameters", Bool(), True,
              "an unused parameter has a zero gradient in JAX"),
    automatic("stage3_module_granularity_threshold", Int(), 0, _HOOKS),
    automatic("stage3_use_all_reduce_for_fetch_params", Bool(), False, _PLACED),
    automatic("stage3_allgather_sequential", Bool(), False, _PLACED),
    automatic("memory_efficient_linear", Bool(), True,
              "gathered weights are never kept for the backward pass"),
    automatic("mics_hierarchical_params_gather", Bool(), False,
              "the collective library picks the hierarchy of an all-gather"),
    automatic("load_from_fp32_weights", Bool(), True,
              "checkpoints hold the fp32 master weights and are restored from them"),
    automatic("pipeline_loading_checkpoint", Bool(), False,
              "checkpoints are read shard by shard, straight to where they belong"),
    automatic("override_module_apply", Bool(), True, _HOOKS),
    automatic("parameter_alignment", Bool(), False, _PLACED),
    automatic("compute_grad_norm", Bool(), True,
              "the norm is a by-product of clipping and always reported"),
    automatic("log_trace_cache_warnings", Bool(), False, "there is no trace cache to invalidate"),
    automatic("enable_sanity_checks", Bool(), False,
              "shapes and shardings are checked while tracing"),
    automatic("save_muon_momentum_buffer_in_memory", Bool(), False,
              "without NVMe offload the momentum is always in device memory"),
    automatic("elastic_checkpoint", Bool(), False,
              "deprecated: every jspeed checkpoint restores on any number of devices"),
)  # fmt: skip

OFFLOAD_PARAM = section(
    "offload_param",
    mapped(
        "device",
        DEVICE,
        "none",
        "where the layers' parameters are between uses: cpu is host memory",
    ),
    mapped("nvme_path", Text(), None, "the folder for the files of parameters and gradients"),
    mapped(
        "buffer_count",
        SIZE,
        5,
        "nvme: how many layers of each parameter are in host memory at a time, for each device",
    ),
    automatic("buffer_size", SIZE, 100_000_000, _AS_LARGE),
    automatic(
        "max_in_cpu",
        SIZE,
        1_000_000_000,
        "with cpu all layers are in host memory, and with nvme only buffers",
    ),
    automatic(
        "pin_memory",
        Bool(),
        True,
        "always pinned with cpu, where devices fetch the parameters themselves",
    ),
)

OFFLOAD_OPTIMIZER = section(
    "offload_optimizer",
    mapped(
        "device",
        DEVICE,
        "none",
        "where master weights and Adam's moments live, and are updated: cpu is host memory",
    ),
    mapped(
        "update",
        choice("host", "device"),
        "host",
        "what updates: the host's cores, or the devices, through which the state is streamed from "
        "pinned memory in chunks",
    ),
    mapped(
        "ratio",
        Number(0, 1),
        1.0,
        "Twin-Flow: the share of the parameters that is offloaded, at any stage",
    ),
    mapped("nvme_path", Text(), None, "the folder for the state's files"),
    mapped("buffer_count", SIZE, 4, "how many chunks of state are in memory at a time"),
    automatic("pin_memory", Bool(), True, _STAGED),
    automatic("pipeline_read", Bool(), False, _STAGED),
    automatic("pipeline_write", Bool(), False, _STAGED),
    automatic(
        "fast_init",
        Bool(),
        False,
        "initial values are computed on the devices, parameter by parameter",
    ),
    later("super_offload", Bool(), False, _SUPER),
    passive(later("cpuadam_cores_perc", Number(0, 1), 0.8, _SUPER)),
)

_INTERVAL = either(Choice(("auto",)), Int(1))

ZENFLOW = section(
    "zenflow",
    later("", Object(), None, _ZENFLOW, on="set"),
    passive(
        later("topk_ratio", Number(above=0, below=1), 0.1, _ZENFLOW),
        later("select_strategy", choice("auto", "step", "epoch"), "auto", _ZENFLOW),
        later("select_interval", _INTERVAL, "auto", _ZENFLOW),
        later("update_interval", _INTERVAL, "auto", _ZENFLOW),
        later("overlap_step", Bool(), False, _ZENFLOW),
        later("offload", Bool(), False, _ZENFLOW),
        later("auto_ratio", Number(0, 1), 0.99, _ZENFLOW),
        later("full_warm_up_rounds", SIZE, 0, _ZENFLOW),
        later("pt_reserved_cores_perc", Number(0, 1), 0.5, _ZENFLOW),
        later("steps_per_epoch", Int(1), None, _ZENFLOW),
    ),
)

ZEROPP = (
    later("zero_hpz_partition_size", SIZE, 1, _ZEROPP, off=(0,)),
    later("zero_quantized_weights", Bool(), False, _ZEROPP),
    later("zero_quantized_nontrainable_weights", Bool(), False, _ZEROPP),
    later("zero_quantized_gradients", Bool(), False, _ZEROPP),
    section(
        "zeropp_loco_param",
        later("", Object(), None, _ZEROPP, on="set"),
        passive(
            later("err_beta", Number(0, 1), 0.8, _ZEROPP),
            later("reset_T", Int(1), 1024, _ZEROPP),
        ),
    ),
)

_NAMES = ListOf(Text(filled=True), single=True)
_LEAF = (
    "leaf modules tell module hooks where to stop; jspeed gathers per access and per scanned layer"
)

LEAF_MODULE = section(
    "leaf_module",
    automatic("classes", _NAMES, None, _LEAF),
    automatic("names", _NAMES, None, _LEAF),
    automatic("name_suffixes", _NAMES, None, _LEAF),
)


def _renamed(old: str, new: str, kind: Bool | Int) -> Key:
    reason = f'another spelling of "zero_optimization.{new}"'
    return mapped(old, kind, None, reason, alias_of=f"zero_optimization.{new}")


# DeepSpeed's typed section also takes these fields by their names inside DeepSpeed.
ALIASES = (
    _renamed("prefetch_bucket_size", "stage3_prefetch_bucket_size", SIZE),
    _renamed("param_persistence_threshold", "stage3_param_persistence_threshold", SIZE),
    _renamed("model_persistence_threshold", "stage3_model_persistence_threshold", SIZE),
    _renamed("max_live_parameters", "stage3_max_live_parameters", SIZE),
    _renamed("max_reuse_distance", "stage3_max_reuse_distance", SIZE),
    _renamed("gather_16bit_weights_on_model_save",
             "stage3_gather_16bit_weights_on_model_save", Bool()),
    _renamed("stage3_gather_fp16_weights_on_model_save",
             "stage3_gather_16bit_weights_on_model_save", Bool()),
    _renamed("module_granularity_threshold", "stage3_module_granularity_threshold", Int()),
    _renamed("use_all_reduce_for_fetch_params", "stage3_use_all_reduce_for_fetch_params", Bool()),
    _renamed("allgather_sequential", "stage3_allgather_sequential", Bool()),
    mapped("cpu_offload", Bool(), None, 'deprecated: "offload_optimizer": {"device": "cpu"}',
           alias_of="zero_optimization.offload_optimizer.device"),
    mapped("cpu_offload_param", Bool(), None, 'deprecated: "offload_param": {"device": "cpu"}',
          alias_of="zero_optimization.offload_param.device"),
    automatic("cpu_offload_use_pin_memory", Bool(), None,
              'deprecated: "offload_optimizer": {"pin_memory": ...}',
              alias_of="zero_optimization.offload_optimizer.pin_memory"),
)  # fmt: skip

ZERO_KEYS = section(
    "zero_optimization",
    mapped("", Bool(), None, "deprecated form: true is stage 1, false is stage 0",
           alias_of="zero_optimization.stage"),
    STAGES,
    STAGE3,
    AUTOMATIC,
    OFFLOAD_PARAM,
    OFFLOAD_OPTIMIZER,
    ZENFLOW,
    *ZEROPP,
    LEAF_MODULE,
    refused("legacy_stage1", Bool(), False,
            "the old stage 1 is gone from DeepSpeed too; remove the key"),
    ALIASES,
    auto=Auto.DEFAULT,
)  # fmt: skip

"""Monitoring, checkpoints, input/output, tuning and elasticity."""

from jspeed.config.comms_ops import op_names
from jspeed.config.key import Auto, automatic, later, mapped, passive, refused, section
from jspeed.config.keys_sweep import AUTOTUNING_KEYS
from jspeed.config.kinds import Bool, Int, ListOf, Number, Text, choice

_COMET = "Comet is not supported yet; use tensorboard, wandb or csv_monitor"
_IN_FLIGHT = (
    'as many requests and threads as buffers: "zero_optimization.offload_optimizer.buffer_count"'
)
_WRITER = "Orbax writes checkpoints asynchronously and in parallel by itself"
_NEBULA = "Nebula is a service of Azure for PyTorch; jspeed's checkpoints are asynchronous already"
_COUNT = Int(0)
_JOB = mapped("job_name", Text(filled=True), "DeepSpeedJobName", "the folder in output_path")
_OUTPUT = mapped(
    "output_path",
    Text(),
    "",
    "where the files go; empty means run.dir, and through jspeed.initialize the current folder",
)
_ENABLED = mapped("enabled", Bool(), False, "switches this monitor on")

MONITOR_KEYS = (
    *section("tensorboard", _ENABLED, _OUTPUT, _JOB, auto=Auto.DEFAULT),
    *section("csv_monitor", _ENABLED, _OUTPUT, _JOB, auto=Auto.DEFAULT),
    *section(
        "wandb",
        _ENABLED,
        mapped("group", Text(), None, "the group of runs"),
        mapped("team", Text(), None, "the team (entity)"),
        mapped("project", Text(filled=True), "deepspeed", "the project"),
        auto=Auto.DEFAULT,
    ),
    *section(
        "comet",
        later("enabled", Bool(), False, _COMET),
        passive(
            later("samples_log_interval", Int(1), 100, _COMET),
            later("project", Text(), None, _COMET),
            later("workspace", Text(), None, _COMET),
            later("api_key", Text(), None, _COMET),
            later("experiment_name", Text(), None, _COMET),
            later("experiment_key", Text(), None, _COMET),
            later("online", Bool(), None, _COMET),
            later("mode", choice("get", "create", "get_or_create"), None, _COMET),
        ),
        auto=Auto.DEFAULT,
    ),
)

_LEVELS = choice("debug", "info", "warning", "error", "critical")

LOG_KEYS = (
    mapped(
        "steps_per_print",
        Int(1),
        None,
        "steps between progress lines; null: run.log_every, and none through jspeed.initialize",
    ),
    mapped(
        "wall_clock_breakdown",
        Bool(),
        False,
        "waits for each step; metrics and progress lines get data_seconds, train_seconds, and "
        "report_seconds and checkpoint_seconds since the step before (jspeed.initialize: "
        "step_seconds, and wait_seconds for the device); forward, backward and update are one XLA "
        "program, into which jax.profiler looks",
    ),
    mapped(
        "memory_breakdown",
        Bool(),
        False,
        "logs the state's bytes by role, all live arrays and the device's own figures when the "
        "engine is made, and before and after each step and evaluation, for which it waits; within "
        "a step, jspeed plan --memory-picture",
    ),
    mapped("dump_state", Bool(), False, "prints the resolved configuration at the start"),
    mapped(
        "log_level",
        _LEVELS,
        None,
        "the level of jspeed's logger; null: info where steps_per_print or dump_state of "
        "jspeed.initialize need it, else as Python's logging is set",
    ),
    automatic("disable_python_gc", Bool(), False, "a step runs no Python that makes garbage"),
    mapped(
        "timers.throughput.enabled",
        Bool(),
        True,
        "adds samples per second to the lines of steps_per_print",
    ),
    automatic(
        "timers.throughput.synchronized",
        Bool(),
        True,
        "times run from one step's metrics arriving to the next one's, which needs no waiting",
    ),
    *section(
        "flops_profiler",
        mapped(
            "enabled",
            Bool(),
            False,
            "prints, after one step, FLOPs by module as the compiled program has them, and what "
            "the step reached; only that step is waited for",
        ),
        automatic(
            "recompute_fwd_factor",
            Number(0),
            0.0,
            "what the backward pass computes again is counted in the compiled program",
        ),
        mapped("profile_step", Int(1), 1, "the optimizer step that is measured"),
        mapped("module_depth", Int(-1), -1, "modules down to this depth are shown; -1: all"),
        mapped("top_modules", Int(1), 1, "so many modules of each depth are named, by FLOPs"),
        mapped("detailed", Bool(), True, "shows the tree of modules"),
        mapped("output_file", Text(filled=True), None, "writes there and not to the terminal"),
    ),
    *section(
        "comms_logger",
        mapped(
            "enabled",
            Bool(),
            False,
            "prints at the end, as engine.comms_summary() does at any time, how often and how much "
            "the compiled step communicates over which mesh axes; times: `jspeed profile`",
        ),
        mapped("prof_all", Bool(), True, "tells of all operations; false: of prof_ops only"),
        mapped(
            "prof_ops",
            ListOf(choice(*op_names())),
            [],
            "the operations to tell of, by DeepSpeed's names or XLA's",
        ),
        mapped("verbose", Bool(), False, "lists every array that travels before the first step"),
        mapped("debug", Bool(), False, "adds the instruction and where in the model it is from"),
        auto=Auto.DEFAULT,
    ),
)

CHECKPOINT_KEYS = (
    *section(
        "checkpoint",
        mapped("tag_validation", choice("Ignore", "Warn", "Fail"), "Warn",
               "what happens when processes save under different tags"),
        automatic("load_universal", Bool(), False,
                  "every checkpoint holds global arrays and loads into any layout"),
        refused("use_node_local_storage", Bool(), False,
                "checkpoints are global arrays in one folder that every process must see"),
        automatic("parallel_write.pipeline_stage", Bool(), False, _WRITER),
        automatic("checkpoint_serialization", Bool(), True, _WRITER),
        automatic("writer.type", choice("MOCK", "PYTHON", "FAST"), "FAST", _WRITER),
        automatic("writer.io_buffer_size", Int(1), 64 * 2**20, _WRITER),
        automatic("writer.io_buffer_double", Bool(), True, _WRITER),
        automatic("writer.show_statistics", Bool(), False, _WRITER),
        automatic("writer.data_parallel", choice("REPLICA", "SOCKET", "MACHINE"), None, _WRITER),
        automatic("writer.decoupled", Bool(), False, _WRITER),
        automatic("writer.io_multiplier", Int(1), 1, _WRITER),
    ),
    *section(
        "nebula",
        refused("enabled", Bool(), False, _NEBULA),
        passive(
            refused("persistent_storage_path", Text(), None, _NEBULA),
            refused("persistent_time_interval", Int(1), 100, _NEBULA),
            refused("num_of_version_in_retention", Int(1), 2, _NEBULA),
            refused("enable_nebula_load", Bool(), True, _NEBULA),
            refused("nebula_load_path", Text(), None, _NEBULA),
        ),
        auto=Auto.DEFAULT,
    ),
    automatic("datastates_ckpt.host_cache_size", Number(0), None, _WRITER),
)  # fmt: skip

AIO_KEYS = section(
    "aio",
    automatic("block_size", Int(1), 2**20,
              'chunks are moved whole; "zero_optimization.sub_group_size" bounds them'),
    automatic("queue_depth", Int(1), 8, _IN_FLIGHT),
    automatic("intra_op_parallelism", Int(1), 1, _IN_FLIGHT),
    automatic("thread_count", Int(1), None, "its name in older documentation",
              alias_of="aio.intra_op_parallelism"),
    automatic("single_submit", Bool(), False, _IN_FLIGHT),
    automatic("overlap_events", Bool(), True, "reads, updates and writes always overlap"),
    refused("use_gds", Bool(), False,
            "the host updates what is on the disk, so it passes through the host's memory; leave "
            "the key out"),
)  # fmt: skip

ELASTICITY_KEYS = section(
    "elasticity",
    mapped("enabled", Bool(), False,
           "a batch size is chosen that the most numbers of devices share evenly; the "
           "accumulation follows the devices, so the loss curve stays"),
    mapped("max_train_batch_size", Int(1), 2000, "no larger one is chosen"),
    mapped("micro_batch_sizes", ListOf(Int(1)), [2, 4, 6],
           "rows of one device at a time; the largest that divides its share is used"),
    mapped("min_gpus", Int(1), 1, "the fewest devices that count"),
    mapped("max_gpus", Int(1), 10_000, "the most devices that count"),
    mapped("num_gpus_per_node", Int(1), 1, "version 0.2 counts whole nodes of so many devices"),
    mapped("model_parallel_size", Int(1), 1,
           "devices that hold one copy of the model: pipe x seq x tensor of the mesh"),
    automatic("min_time", _COUNT, 0,
              "for schedulers that read this file; DeepSpeed does not use it either"),
    mapped("prefer_larger_batch", Bool(), True,
           "of two batch sizes that as many numbers of devices share, the larger or the smaller"),
    mapped("prefer_large_batch", Bool(), None, "its name in the documentation",
           alias_of="elasticity.prefer_larger_batch"),
    mapped("ignore_non_elastic_batch_info", Bool(), False,
           "batch sizes given beside are ignored instead of refused"),
    mapped("version", Number(0), 0.2, "0.1 counts devices, 0.2 whole nodes"),
)  # fmt: skip

TOOL_KEYS = (
    *MONITOR_KEYS,
    *LOG_KEYS,
    *CHECKPOINT_KEYS,
    *AIO_KEYS,
    *AUTOTUNING_KEYS,
    *ELASTICITY_KEYS,
)

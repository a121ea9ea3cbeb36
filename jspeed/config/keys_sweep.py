"""jspeed's `sweep` section, and DeepSpeed's `autotuning`, whose settings lead into it."""

from jspeed.config.key import automatic, mapped, refused, section
from jspeed.config.kinds import Anything, Bool, Int, ListOf, Text, choice

_COUNT = Int(1)
_AXES = choice("pipe", "data", "replica", "seq", "tensor")
_SIZES = ListOf(_COUNT, single=True)

SWEEP_KEYS = section(
    "sweep",
    mapped("axes", ListOf(_AXES, single=True), None,
           "the mesh axes that vary; null: data, tensor where a rule names it, replica by hosts"),
    mapped("pipe", _SIZES, None,
           "sizes of the pipe axis; null: the run's, or with pipe in axes those that divide"),
    mapped("seq", _SIZES, None,
           "sizes of the seq axis; null: the run's, or with seq in axes those that divide"),
    mapped("schedules", ListOf(choice("gpipe", "1f1b", "interleaved-1f1b", "zb-h1"), single=True),
           None, "what pipeline.schedule is set to; null: the run's, or all where pipe varies"),
    mapped("chunks", ListOf(Int(2), single=True), None,
           "pieces per stage of interleaved-1f1b; null: the run's, at least 2"),
    mapped("replica", _SIZES, None, "sizes of the replica axis; null: those that divide"),
    mapped("tensor", _SIZES, None,
           "sizes of the tensor axis; null: those that divide, if a rule names the axis"),
    mapped("stages", ListOf(Int(0, 3), single=True), [0, 1, 2, 3], "ZeRO stages"),
    mapped("micro_batch_sizes", _SIZES, None,
           "rows of one device at a time; null: powers of two from the least to the most"),
    mapped("min_micro_batch_size", _COUNT, 1, "the least, where micro_batch_sizes is null"),
    mapped("max_micro_batch_size", _COUNT, None,
           "the most, where micro_batch_sizes is null; null: what leaves one microbatch"),
    mapped("micro_batch_count", _COUNT, None,
           "how many, evenly chosen, where micro_batch_sizes is null; null: all"),
    mapped("remat", ListOf(choice("none", "full"), single=True), ["none", "full"],
           "what model.remat is set to"),
    mapped("output", Text(filled=True), None, "the folder of results; null: from run.dir"),
    mapped("top", _COUNT, None,
           "what cannot enter so many best is not compiled; null: all are, and 10 are printed"),
    mapped("measure_first_step", Int(0), 3, "--measure: the first step that is timed, from 0"),
    mapped("measure_last_step", _COUNT, 8, "--measure: the steps of a run; the last is timed too"),
)  # fmt: skip

_COMPILED = "a sweep compiles every candidate that no bound rules out"
_BATCH = "a sweep leaves train_batch_size as it is, so that it never changes the training"
_SHAPES = "a sweep reads it from the model itself"
_ALIKE = "with one global batch, throughput, latency and FLOP/s rank alike"

AUTOTUNING_KEYS = section(
    "autotuning",
    automatic("enabled", Bool(), False,
              "tuning is a command of its own, `jspeed sweep`, which reads its settings here; "
              "training goes ahead as the file says"),
    automatic("fast", Bool(), True, _COMPILED),
    mapped("results_dir", Text(filled=True), "autotuning_results", "the folder of results",
           alias_of="sweep.output"),
    automatic("exps_dir", Text(), "autotuning_exps", "candidates are rows in the results"),
    automatic("overwrite", Bool(), True,
              "finished rows are taken up; `jspeed sweep --fresh` starts anew"),
    mapped("start_profile_step", Int(0), 3, "the first step that is timed",
           alias_of="sweep.measure_first_step"),
    mapped("end_profile_step", _COUNT, 5, "the last step that is timed",
           alias_of="sweep.measure_last_step"),
    automatic("metric", choice("throughput", "latency", "flops"), "throughput", _ALIKE),
    automatic("metric_path", Text(), None, "measurements come from the runs' own metrics"),
    automatic("tuner_type", choice("gridsearch", "random", "model_based"), "gridsearch", _COMPILED),
    automatic("tuner_early_stopping", Int(0), 5, _COMPILED),
    automatic("tuner_num_trials", _COUNT, 50, _COMPILED),
    automatic("arg_mappings.*", Anything(), None,
              "best.json is a whole run file, so no arguments of a script have to change"),
    automatic("model_info.profile", Bool(), False, _SHAPES),
    automatic("model_info.num_params", _COUNT, None, _SHAPES),
    automatic("model_info.hidden_size", _COUNT, None, _SHAPES),
    automatic("model_info.num_layers", _COUNT, None, _SHAPES),
    automatic("model_info_path", Text(), None, _SHAPES),
    mapped("mp_size", _COUNT, 1, "the size of the tensor axis", alias_of="sweep.tensor"),
    refused("max_train_batch_size", _COUNT, None, _BATCH),
    refused("min_train_batch_size", _COUNT, 1, _BATCH),
    mapped("max_train_micro_batch_size_per_gpu", _COUNT, 1024, "the largest microbatch",
           alias_of="sweep.max_micro_batch_size"),
    mapped("min_train_micro_batch_size_per_gpu", _COUNT, 1, "the smallest microbatch",
           alias_of="sweep.min_micro_batch_size"),
    mapped("num_tuning_micro_batch_sizes", _COUNT, 3, "how many microbatches are tried",
           alias_of="sweep.micro_batch_count"),
)  # fmt: skip

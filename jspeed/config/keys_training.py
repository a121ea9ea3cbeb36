"""The keys of the step: batch sizes, gradients, communication and precision."""

from jspeed.config.key import (
    Auto,
    automatic,
    later,
    mapped,
    passive,
    refused,
    section,
)
from jspeed.config.kinds import Anything, Bool, DTypeName, Int, ListOf, Number, Text, choice, either

_WIRE = choice("fp16", "bf16", "fp32")
_DTYPE = DTypeName()
_FACTS = Auto.FACTS

BATCH_KEYS = (
    mapped("train_batch_size", Int(1), None,
           "the global batch of one optimizer step", auto=_FACTS),
    mapped("train_micro_batch_size_per_gpu", Int(1), None,
           "the rows one device handles at a time", auto=_FACTS),
    mapped("gradient_accumulation_steps", Int(1), None,
           "the microbatches of one step, accumulated before the update", auto=_FACTS),
    refused("managed_gradient_accumulation", Bool(), True,
            "one jitted step owns accumulation; write a loop of your own on engine.train_step"),
    automatic("dataloader_drop_last", Bool(), False,
              "shapes are static: jspeed's data pipeline always gives whole batches"),
)  # fmt: skip

GRADIENT_KEYS = (
    mapped("gradient_clipping", Number(0), 1.0,
           "the largest global norm of the gradient; 0 switches clipping off", auto=_FACTS),
    mapped("prescale_gradients", Bool(), False,
           "divides gradients by the number of devices before they are summed, not after"),
    mapped("gradient_predivide_factor", Number(above=0), 1.0,
           "divides gradients by this before the sum, by the rest after (no prescale_gradients)"),
    mapped("gradient_allreduce_op", choice("mean", "sum"), "mean",
           "whether devices' gradients are averaged or added"),
    mapped("communication_data_type", _WIRE, None,
           "the dtype in which gradients are reduced; null means the compute dtype"),
    automatic("seq_parallel_communication_data_type", _WIRE, "fp32",
              "XLA sums gradients over mesh.seq in the dtype of the products that make them; "
              "communication_data_type is that of the sum over the batch axes"),
    refused("sparse_gradients", Bool(), False,
            "embedding gradients are reduced densely, with the same result; set it to false"),
    automatic("disable_allgather", Bool(), False, "deprecated and unused in DeepSpeed"),
    automatic("zero_allow_untested_optimizer", Bool(), False,
              "ZeRO is placement here, so every optax optimizer works with it"),
    automatic("zero_force_ds_cpu_optimizer", Bool(), True,
              "there is one optimizer implementation; no CPU variant has to be forced"),
)  # fmt: skip

_HALF_MASTER = "16-bit master weights are not built yet; master weights are fp32"

PRECISION_KEYS = (
    *section(
        "fp16",
        mapped("enabled", Bool(), False, "float16 compute with loss scaling", auto=_FACTS),
        mapped("auto_cast", Bool(), False, "casts floating-point inputs to float16"),
        mapped("loss_scale", Number(0), 0.0, "a fixed loss scale; 0 means dynamic"),
        mapped("initial_scale_power", Int(0, 127), 16, "dynamic loss scaling starts at 2^this"),
        mapped("loss_scale_window", Int(), 1000, "good steps before the scale doubles"),
        mapped("hysteresis", Int(1), 2, "overflows before the scale halves"),
        mapped("consecutive_hysteresis", Bool(), False, "a good step refills the hysteresis"),
        mapped("min_loss_scale", Number(), 1.0, "the scale never falls below this"),
        later("fp16_master_weights_and_grads", Bool(), False, _HALF_MASTER),
        auto=Auto.DEFAULT,
    ),
    *section(
        "bf16",
        mapped("enabled", Bool(), False, "bfloat16 compute, fp32 master weights", auto=_FACTS),
        automatic("immediate_grad_update", Bool(), False,
                  "gradients are added to the accumulator inside the compiled step"),
        mapped("check_grad_overflow", Bool(), True, "a step with a non-finite gradient is skipped"),
        later("bf16_master_weights_and_grads", Bool(), False, _HALF_MASTER),
        later("bf16_optimizer_states", Bool(), False, "16-bit moments are not built yet"),
        auto=Auto.DEFAULT,
    ),
    *section(
        "data_types",
        mapped("grad_accum_dtype", _DTYPE, None,
               "the dtype of the gradient accumulator; null means fp32"),
        mapped("param_dtype", _DTYPE, None,
               "must agree with fp16/bf16, which decide the compute dtype"),
        automatic("buffer_dtype", _DTYPE, None,
                  "buffers are arrays of the model, kept in the dtype that it gave them"),
        automatic("keep_in_fp32_modules", either(choice("auto"), ListOf(Text())), "auto",
                  "a Flax module keeps fp32 where its own dtype says so"),
    ),
    *section(
        "torch_autocast",
        refused("enabled", Bool(), False,
                "JAX has no autocast; use bf16, or give single modules a dtype of their own"),
        passive(
            refused("dtype", choice("bfloat16", "float16", "bf16", "fp16"), None,
                    "belongs to torch_autocast"),
            refused("lower_precision_safe_modules", ListOf(Text()), None,
                    "belongs to torch_autocast"),
        ),
    ),
    *section(
        "amp",
        refused("enabled", Bool(), False, "NVIDIA apex is for PyTorch only; use bf16 or fp16"),
        passive(refused("*", Anything(), None, "an apex argument")),
    ),
)  # fmt: skip

_BF16 = 'the older name of "bf16"'


def _old_bf16(name: str):
    return mapped(f"bfloat16.{name}", Bool(), None, _BF16, alias_of=f"bf16.{name}",
                  auto=Auto.FACTS if name == "enabled" else Auto.DEFAULT)  # fmt: skip


BFLOAT16_ALIASES = tuple(
    _old_bf16(name)
    for name in (
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    )
)

TRAINING_KEYS = (*BATCH_KEYS, *GRADIENT_KEYS, *PRECISION_KEYS, *BFLOAT16_ALIASES)

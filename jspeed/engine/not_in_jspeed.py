"""DeepSpeed's calls that have no counterpart here, each with what to write instead."""

from __future__ import annotations

from typing import Any

from jspeed.core.errors import NotInJspeedError

_THREE_CALLS = (
    "JAX differentiates functions, not values, so the loss goes in as a function:\n"
    "    engine = jspeed.initialize(model=model, loss_fn=loss_fn, config=config)\n"
    "    metrics = engine.train_batch(batch)   # forward, backward and step of one whole batch"
)
_INSTEAD = {
    "forward": _THREE_CALLS,
    "backward": _THREE_CALLS,
    "step": _THREE_CALLS,
    "scale": "train_batch scales the loss itself; engine.loss_scale() reads the scale.",
    "zero_grad": "gradients are values inside the step and need no zeroing; delete the call.",
    "no_sync": (
        "train_batch accumulates microbatches locally and reduces once under ZeRO stages 0 "
        "and 1; delete it."
    ),
    "coalesce_grad_reduction": "use ZeRO stage 1: train_batch then reduces once per step.",
    "is_gradient_accumulation_boundary": (
        "every call of train_batch ends on a boundary; delete the question."
    ),
    "set_gradient_accumulation_boundary": (
        "use engine.set_train_batch_size to accumulate over more microbatches."
    ),
    "train": "train_batch trains and eval_batch evaluates; there is no mode to switch.",
    "eval": "use engine.eval_batch(batch), which runs the model in evaluation mode.",
    "deepspeed_io": "use any iterable of batches, or jspeed.data.build_dataset for text.",
    "compile": "every step is compiled by XLA already; delete the call.",
    "empty_partition_cache": "gathered weights never outlive their use; delete the call.",
    "allreduce_gradients": "train_batch reduces gradients as the ZeRO stage says; delete the call.",
    "module_state_dict": "use engine.parameters() for whole arrays, or save_checkpoint.",
    "load_module_state_dict": "use load_checkpoint(directory, load_module_only=True).",
}


def raise_not_in_jspeed(name: str) -> Any:
    """Raises `NotInJspeedError` for a DeepSpeed call, or `AttributeError` for any other name."""
    if name in _INSTEAD:
        raise NotInJspeedError(f"engine.{name}() has no counterpart in jspeed: {_INSTEAD[name]}")
    raise AttributeError(f"'Engine' object has no attribute {name!r}")


def raise_called() -> Any:
    """Raises for `engine(batch)`."""
    raise NotInJspeedError(f"engine(batch) has no counterpart in jspeed: {_THREE_CALLS}")

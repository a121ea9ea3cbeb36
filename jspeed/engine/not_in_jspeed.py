"""DeepSpeed's calls and arguments without a counterpart here, each with what to write instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from jspeed.core.errors import NotInJspeedError

P = ParamSpec("P")
R = TypeVar("R")

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
    "register_compile_pass": "XLA compiles the step, with passes of its own; delete the call.",
    "empty_partition_cache": "gathered weights never outlive their use; delete the call.",
    "allreduce_gradients": "train_batch reduces gradients as the ZeRO stage says; delete the call.",
    "module_state_dict": "use engine.parameters() for whole arrays, or save_checkpoint.",
    "load_module_state_dict": "use load_checkpoint(directory, load_module_only=True).",
    "get_pld_theta": "progressive layer drop is not built yet; delete the call.",
    "set_custom_curriculum_learning_schedule": (
        "curriculum learning is not built yet; choose the batches that you give to train_batch."
    ),
    "set_data_post_process_func": (
        "change each batch before you give it: engine.train_batch(process(batch))."
    ),
    "optimizer": (
        "the optimizer is a function inside the step. engine.get_lr() and engine.get_mom() read "
        "its rates, engine.state.opt_state holds its state."
    ),
    "lr_scheduler": (
        "the schedule is a function inside the step and moves on by itself; engine.get_lr() reads "
        "the rate, which each step's metrics hold too. Delete scheduler.step()."
    ),
    "training_dataloader": (
        "you iterate over the data yourself: for batch in batches: engine.train_batch(batch)."
    ),
}
_ATTRIBUTES = ("optimizer", "lr_scheduler", "training_dataloader")

_PROCESSES = (
    "leave it out; processes that jspeed launch, torchrun, SLURM or Open MPI has started find each "
    "other."
)
_OWN_DATA = "iterate over the data yourself: for batch in batches: engine.train_batch(batch)."
_MESH = 'leave it out; the configuration shapes the mesh: "mesh": {"data": -1, "tensor": 2}.'
INITIALIZE = {
    "args": "leave it out and pass the file itself: config=args.deepspeed_config.",
    "training_data": _OWN_DATA,
    "collate_fn": _OWN_DATA,
    "distributed_port": _PROCESSES,
    "dist_init_required": _PROCESSES,
    "mpu": _MESH,
    "mesh_param": _MESH,
    "config_params": "write config=... instead.",
}
_STRICT = "leave it out; what a checkpoint and the model do not share is an error that names it."
LOAD_CHECKPOINT = {
    "load_module_strict": _STRICT,
    "custom_load_fn": "read the arrays with jspeed.checkpoint.CheckpointStore(directory).restore.",
}
_FROZEN = "leave it out; all parameters are saved."
SAVE = {"exclude_frozen_parameters": _FROZEN}
TRAIN_BATCH = {"data_iter": "a step takes the batch itself: engine.train_batch(next(data_iter))."}
_ONLY_LOSS = "leave it out; eval_batch returns the loss as a mean, a total and a weight."
EVAL_BATCH = {
    "data_iter": "it takes the batch itself: engine.eval_batch(next(data_iter)).",
    "return_logits": "call engine.module on the inputs, or jax.jit a function of it.",
    "compute_loss": _ONLY_LOSS,
    "reduce_output": _ONLY_LOSS,
    "bcast_loss": _ONLY_LOSS,
    "num_micro_batches": "leave it out; the whole batch is evaluated at once.",
}


def raise_not_in_jspeed(name: str) -> Any:
    """Raises `NotInJspeedError` for a DeepSpeed call, or `AttributeError` for any other name."""
    if name in _INSTEAD:
        call = name if name in _ATTRIBUTES else f"{name}()"
        raise NotInJspeedError(f"engine.{call} has no counterpart in jspeed: {_INSTEAD[name]}")
    raise AttributeError(f"'Engine' object has no attribute {name!r}")


def raise_called() -> Any:
    """Raises for `engine(batch)`."""
    raise NotInJspeedError(f"engine(batch) has no counterpart in jspeed: {_THREE_CALLS}")


def raise_unpacked() -> Any:
    """Raises for `engine, optimizer, loader, scheduler = jspeed.initialize(...)`."""
    raise NotInJspeedError(
        "jspeed.initialize returns the engine alone, so that there is nothing to unpack: write "
        "engine = jspeed.initialize(...). The optimizer and the schedule are functions inside the "
        "step, and you iterate over the data yourself."
    )


def refuses(arguments: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: DeepSpeed's arguments that a function has not are errors that say what to write.

    Args:
      arguments: name -> what to do instead.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name in arguments:
                    raise NotInJspeedError(
                        f"{function.__name__}({name}=...) has no counterpart in jspeed: "
                        f"{arguments[name]}"
                    )
            return function(*args, **kwargs)

        return call

    return decorate


def takes_names_only(*required: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: arguments without a name, and required ones that are missing, are errors that
    show the call."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        shown = f"jspeed.{function.__name__}({', '.join(f'{name}={name}' for name in required)})"

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            missing = [name for name in required if name not in kwargs]
            if args:
                raise NotInJspeedError(
                    f"{function.__name__} was given {len(args)} argument(s) without a name; all go "
                    f"by name: {shown}."
                )
            if missing:
                raise NotInJspeedError(
                    f"{function.__name__} lacks {' and '.join(missing)}: write {shown}. loss_fn is "
                    "a function (model, batch, rng) -> scalar; JAX differentiates functions, not "
                    "values."
                )
            return function(*args, **kwargs)

        return call

    return decorate

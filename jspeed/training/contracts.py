"""What a run and a user's model agree on, and errors that say how to keep it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspeed.core.errors import ModelError
from jspeed.core.loss import LossSum
from jspeed.core.tree import named_leaves

LossFn = Callable[[Any, Any, jax.Array], Any]

_EXPECTED = "expected a scalar mean or jspeed.LossSum(total, weight) of two scalars"


def check_callable(function: Any, name: str, arguments: tuple[str, ...]) -> None:
    """Checks that a user's function can be called with so many positional arguments.

    Raises:
      ModelError: it is no function, or takes other arguments.
    """
    call = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise ModelError(f"{name} is {_describe(function)}; expected a function {call}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins do not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ModelError(
            f"{name} takes {signature}, but is called as {call}: {error}. Give it these "
            f"{len(arguments)} positional parameters, used or not."
        ) from None


def call_loss(loss_fn: LossFn, model: Any, batch: Any, rng: jax.Array) -> Any:
    """`loss_fn(model, batch, rng)`, its arguments checked first."""
    check_callable(loss_fn, "loss_fn", ("model", "batch", "rng"))
    return loss_fn(model, batch, rng)


def loss_parts(result: Any) -> LossSum:
    """A loss function's result as a sum and weight, in fp32; a plain scalar mean has weight one.

    Raises:
      ModelError: the result is neither a floating-point scalar nor a `LossSum` of scalars.
    """
    if not isinstance(result, LossSum):
        _check_scalar(result, "")
        result = LossSum(result, jnp.ones((), jnp.float32))
    else:
        _check_scalar(result.total, " as a LossSum's total")
        if jnp.ndim(result.weight) != 0:
            raise ModelError(
                f"loss_fn returned {_describe(result.weight)} as a LossSum's weight; {_EXPECTED}. "
                "The weight is the sum of the weights of all examples, like the total."
            )
    return LossSum(
        jnp.asarray(result.total, jnp.float32),
        jax.lax.stop_gradient(jnp.asarray(result.weight, jnp.float32)),
    )


def _check_scalar(loss: Any, where: str) -> None:
    if hasattr(loss, "shape") and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating):
        return
    if isinstance(loss, tuple | list):
        advice = (
            "A step has no auxiliary outputs: return the loss alone, and measure other things "
            "with eval_fn and eval_batch."
        )
    elif loss is None:
        advice = 'Does the function end with "return loss"?'
    elif getattr(loss, "shape", ()) != ():
        advice = "Return losses.mean(), or LossSum(losses.sum(), losses.size)."
    else:
        advice = "The loss must be computed from the model's parameters, in floating point."
    raise ModelError(f"loss_fn returned {_describe(loss)}{where}; {_EXPECTED}. {advice}")


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(map(_describe, value))})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def check_parameters(params: Any, model: str, kind: str = "parameters") -> None:
    """Raises `ModelError` for a model without parameters."""
    if not jax.tree.leaves(params):
        raise ModelError(f"{model} has no {kind}, so there is nothing to train.")


def as_arrays(tree: Any) -> Any:
    """Python and NumPy numbers among a tree's leaves as JAX arrays."""

    def convert(leaf: Any) -> jax.Array:
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf))

    return jax.tree.map(convert, tree)


def carried(new: Any, old: Any) -> Any:
    """A model's other state after a call, in the tree, shapes and dtypes it had before.

    Microbatches run in a loop, so state that grows or changes its shape cannot be carried. Numbers
    computed in the compute dtype go back to the dtype they are kept in.

    Raises:
      ModelError: a leaf appeared, vanished or changed its shape; names it.
    """
    before, after = dict(named_leaves(old)), dict(named_leaves(new))
    for path in (*before, *after):
        if path not in before:
            change = "appeared during the call"
        elif path not in after:
            change = "was removed during the call"
        elif jnp.shape(before[path]) != jnp.shape(after[path]):
            shapes = list(jnp.shape(before[path])), list(jnp.shape(after[path]))
            change = f"changed its shape from {shapes[0]} to {shapes[1]} during the call"
        else:
            continue
        raise ModelError(
            f"the model's state {path} {change}; what is carried from microbatch to microbatch "
            "must keep its structure. Create it with the model, or read it inside loss_fn and "
            "leave it out of the state."
        )
    leaves = [_in_dtype(after[path], leaf.dtype) for path, leaf in before.items()]
    return jax.tree.unflatten(jax.tree.structure(old), leaves)


def _in_dtype(leaf: Any, dtype: Any) -> Any:
    return leaf if getattr(leaf, "dtype", None) == dtype else jnp.asarray(leaf).astype(dtype)

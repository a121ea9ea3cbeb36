"""What attention keeps between its passes beside its arguments, under a name for policies of
`jax.checkpoint`."""

from __future__ import annotations

from typing import Any

from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "attention_out"
"""Kept by a policy, the backward pass does not run the forward kernel again."""


def named(*arrays: Any) -> tuple[Any, ...]:
    """The same arrays (or None), named `RESIDUALS`."""
    return tuple(checkpoint_name(array, RESIDUALS) for array in arrays)

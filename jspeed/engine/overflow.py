"""What is said and done about a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jspeed.core.errors import ModelError


def note_overflow(
    step: int,
    values: Mapping[str, Any],
    *,
    parameters: Sequence[str],
    skipped: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Says which gradient was the first not to be finite, and what is done about it.

    Args:
      step: whose gradients they are.
      values: the step's metrics as Python numbers.
      parameters: paths of all parameters in tree order; if empty, their number is told instead.
      skipped: whether such a step is skipped.
      say: takes the line.

    Returns:
      What belongs into the step's metrics: `skipped` and `first_nonfinite`, the parameter's path.

    Raises:
      ModelError: the loss scale cannot get any smaller.
    """
    index = int(values["first_nonfinite"])
    name = parameters[index] if parameters else f"parameter {index} of engine.parameters()"
    text = f"step {step}: the gradient of {name} is not finite"
    if "loss_scale" in values:
        text += f"; loss scale {values['loss_scale']:g} -> {values['next_loss_scale']:g}"
    say(text + ("; the step is skipped." if skipped else "."))
    if values.get("loss_scale_exhausted"):
        raise ModelError(
            f"step {step}: gradients overflow although the loss scale is at its minimum "
            f"({values['loss_scale']:g}), first in {name}. Train in bf16, lower the learning "
            "rate, or look for what makes this parameter's gradient infinite. The last "
            "checkpoint is from before this."
        )
    return {"skipped": int(skipped), "first_nonfinite": name}

"""From jspeed's metric names to the event names that DeepSpeed writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_PREFIX = "Train/Samples/"
_DEEPSPEED_NAMES = {"loss": "train_loss", "learning_rate": "lr"}


def event_name(metric: str) -> str:
    """DeepSpeed's event name of a metric.

    `loss` and `learning_rate` have DeepSpeed's own names, `Train/Samples/train_loss` and
    `Train/Samples/lr`. Other metrics keep theirs behind the same prefix, which for `loss_scale` and
    `elapsed_time_ms_*` is what DeepSpeed writes. A name that has a `/` is left as it is.
    """
    return metric if "/" in metric else _PREFIX + _DEEPSPEED_NAMES.get(metric, metric)


def plain(value: Any) -> int | float | str | bool | None:
    """A Python scalar for a Python, NumPy or other array scalar; strings and None stay.

    Raises:
        TypeError: the value is not a scalar.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    try:
        return value.item()
    except (AttributeError, ValueError, TypeError):
        raise TypeError(
            f"metrics are scalars; got {type(value).__name__} of shape "
            f"{getattr(value, 'shape', 'unknown')}"
        ) from None


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that can be drawn, as floats; words, flags and missing values are left out."""
    values = {name: plain(value) for name, value in metrics.items()}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

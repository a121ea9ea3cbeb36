"""Which parameters are trained, and which stay as they are."""

from __future__ import annotations

import math
import re

from jspeed.config import Config
from jspeed.core.errors import ConfigError
from jspeed.layout.zero import Layout


def frozen_parameters(config: Config, layout: Layout) -> frozenset[str]:
    """The parameters that no pattern of `trainable` matches.

    Args:
      config: resolved.
      layout: of the parameters.

    Raises:
      ConfigError: a pattern matches no parameter, or there is none.
    """
    patterns = config.trainable
    if patterns is None:
        return frozenset()
    some = ", ".join(list(layout.leaves)[:8]) + (", ..." if len(layout.leaves) > 8 else "")
    if not patterns:
        raise ConfigError(
            '"trainable": [] freezes every parameter, so nothing would be trained. Expected '
            f"regexes of whole parameter paths, or null for all; this model has {some}"
        )
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in layout.leaves):
            raise ConfigError(
                f'"trainable": {pattern!r} matches no parameter. Expected a regex of whole paths, '
                f'as "blocks/.*"; this model has {some}'
            )
    return frozenset(
        path
        for path in layout.leaves
        if not any(re.fullmatch(pattern, path) for pattern in patterns)
    )


def frozen_product_weights(layout: Layout) -> int:
    """How many weights of matrix products are frozen, in jspeed's own models.

    A table that is also the head counts, one that is only looked up does not.
    """
    heads = {"lm_head"} if "lm_head" in layout.leaves else {"wte", "embedding"}
    return sum(
        math.prod(layout.leaves[path].shape)
        for path in layout.frozen
        if path.endswith("/kernel") or path in heads
    )

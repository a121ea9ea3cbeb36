"""A configuration's `sparse_attention` in a model that is passed to `jspeed.initialize`."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

from jspeed.config import Config
from jspeed.core.errors import ConfigError
from jspeed.engine.reporting import LOGGER
from jspeed.nn.attention_sparse import make_pattern
from jspeed.nn.transformer import PatternedAttention

_OWN = (
    '"sparse_attention": the model computes its attention itself, so nothing would follow the '
    "pattern. Call jspeed.nn.SparseSelfAttention(causal=...) in it, which takes its pattern "
    "from this section; or remove the section."
)
_LOWER = (
    '"sparse_attention.attention": "bidirectional" cannot let a token see what comes after it in '
    "the causal {path}: the lower triangle of the layout is used."
)


def sets_pattern(config: Config) -> Callable[[nnx.Module | None], None] | None:
    """What sets the pattern of a configuration in a model's attention; None where there is none.

    DeepSpeed reads the section and leaves it to the model to ask for it; here it is an error if no
    module of the model follows it.
    """
    section = config.sparse_attention
    if section is None:
        return None
    pattern = make_pattern(section)
    said: list[str] = []

    def adapt(module: nnx.Module | None) -> None:
        followed = [] if module is None else _patterned(module)
        if not followed and pattern is not None:  # dense is what any attention computes
            raise ConfigError(_OWN)
        for path, attention in followed:
            if attention.pattern is not None and attention.pattern != pattern:
                raise ConfigError(
                    f'"sparse_attention.mode": "{section.mode}" asks for {pattern}, and the '
                    f"model's {path} has {attention.pattern} already. Remove one of the two."
                )
            attention.pattern = pattern
        downward = [path for path, attention in followed if attention.causal]
        if downward and not said and pattern is not None and section.attention == "bidirectional":
            said.append(_LOWER.format(path=downward[0]))
            LOGGER.warning(*said)

    return adapt


def _patterned(module: nnx.Module) -> list[tuple[str, PatternedAttention]]:
    """The modules that follow patterns, by path."""
    return [
        ("/".join(map(str, path)) or "attention", found)
        for path, found in nnx.iter_modules(module)
        if isinstance(found, PatternedAttention)
    ]

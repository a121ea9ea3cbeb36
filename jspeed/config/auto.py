"""The value "auto": resolved where Hugging Face's integration of DeepSpeed resolves it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from jspeed.config import elastic_rules
from jspeed.config.batch import ACCUMULATION, MICRO, TRAIN
from jspeed.config.check import Entry
from jspeed.config.keys_optimizer import OPTIMIZERS, find_family
from jspeed.config.kinds import RefusedError
from jspeed.config.problem import Problem
from jspeed.config.values import Values

_ZERO = "zero_optimization"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoFacts:
    """What is known about a run beyond its configuration; None is unknown.

    Args:
        hidden_size: the width of the model.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of warm-up; 0 where nothing is said, as in Hugging Face.
        learning_rate: the peak learning rate.
        max_grad_norm: where to clip; DeepSpeed's 1.0 where nothing is said.
        compute_dtype: the precision for fp16/bf16 "auto"; both off where nothing is said.
        train_batch_size: rows of one optimizer step.
        micro_batch_size: rows of one device at a time.
        gradient_accumulation_steps: microbatches of one step.
        data_parallel_size: devices that share a batch; checks the batch triangle.
    """

    hidden_size: int | None = None
    total_steps: int | None = None
    warmup_steps: int | None = None
    learning_rate: float | None = None
    max_grad_norm: float | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    train_batch_size: int | None = None
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    data_parallel_size: int | None = None


Resolver = Callable[[Values, AutoFacts], Any]


def _width(values: Values, facts: AutoFacts) -> int | None:
    return facts.hidden_size or values.get("model.hidden_size")


def _times_width(factor: float, power: int) -> Resolver:
    def resolve(values: Values, facts: AutoFacts) -> int | None:
        width = _width(values, facts)
        return int(factor * width**power) if width is not None else None

    return resolve


def _rate(values: Values, facts: AutoFacts) -> float | None:
    if facts.learning_rate is not None:
        return facts.learning_rate
    for path in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"):
        if values.is_given(path):
            value = values.given[path].value
            return value[0] if isinstance(value, list) else value
    return _default_rate(values)


def _default_rate(values: Values) -> float | None:
    """The rate of an optimizer that does not say its own."""
    if not values.is_given("optimizer.type") or "optimizer.params.lr" in values.given:
        return None
    family = find_family(OPTIMIZERS, values.get("optimizer.type"))
    rates = [key.default for key in family.params if key.path == "lr"] if family else []
    return rates[0] if rates else None


def _steps(values: Values, facts: AutoFacts) -> int | None:
    return facts.total_steps if facts.total_steps is not None else values.get("run.steps")


def _precision(name: str) -> Resolver:
    return lambda values, facts: facts.compute_dtype == name


def _fact(name: str, default: Any = None) -> Resolver:
    def resolve(values: Values, facts: AutoFacts) -> Any:
        value = getattr(facts, name)
        return default if value is None else value

    return resolve


_HIDDEN = (
    'the width of the model: "model.hidden_size" in a run file, an attribute hidden_size of the '
    'model or of its config, or a number in place of the "auto"'
)
_LR = 'the learning rate: "optimizer.params.lr" or "scheduler.params.warmup_max_lr" as a number'
_BATCH = f'a number for "{TRAIN}" or "{MICRO}"'

_FACT = "a fact that fits the key"

# What resolves each key, and what to say when nothing does.
RESOLVERS: Mapping[str, tuple[Resolver, str]] = {
    TRAIN: (_fact("train_batch_size"), _BATCH),
    MICRO: (_fact("micro_batch_size"), _BATCH),
    ACCUMULATION: (_fact("gradient_accumulation_steps"), _BATCH),
    "gradient_clipping": (_fact("max_grad_norm", 1.0), _FACT),
    "optimizer.params.lr": (_rate, _LR),
    "scheduler.params.warmup_max_lr": (_rate, _LR),
    "scheduler.params.warmup_min_lr": (lambda values, facts: 0.0, _FACT),
    "scheduler.params.warmup_num_steps": (_fact("warmup_steps", 0), _FACT),
    "scheduler.params.total_num_steps": (_steps, 'the length of the run: "run.steps"'),
    "fp16.enabled": (_precision("float16"), _FACT),
    "bf16.enabled": (_precision("bfloat16"), _FACT),
    f"{_ZERO}.reduce_bucket_size": (_times_width(1, 2), _HIDDEN),
    f"{_ZERO}.stage3_prefetch_bucket_size": (_times_width(0.9, 2), _HIDDEN),
    f"{_ZERO}.stage3_param_persistence_threshold": (_times_width(10, 1), _HIDDEN),
}


def unresolved(path: str) -> Problem:
    """Return the problem of an "auto" that nothing resolves; its text says what would."""
    return Problem(path, f'"auto" cannot be resolved here; it needs {RESOLVERS[path][1]}.')


def resolve(values: Values, facts: AutoFacts) -> tuple[Values, list[str]]:
    """Return `values` with "auto" resolved where it can be, and the paths where it cannot."""
    given: dict[str, Entry] = dict(values.given)
    open_paths: list[str] = []
    if elastic_rules.is_on(values):
        for name in (TRAIN, MICRO, ACCUMULATION):
            if name in given and given[name].pending:
                given[name] = replace(given[name], value=None, pending=False)
    for path, entry in list(given.items()):
        if not entry.pending:
            continue
        value = _fitting(entry, RESOLVERS[path][0](values, facts))
        if value is not None:
            given[path] = replace(entry, value=value, pending=False, note='resolved from "auto"')
        elif path not in (TRAIN, MICRO, ACCUMULATION):  # the triangle may complete those
            open_paths.append(path)
    open_paths.extend(_close_triangle(given))
    return replace(values, given=given), open_paths


def _fitting(entry: Entry, value: Any) -> Any:
    """Return `value` as the key holds it, or None when it does not fit the key."""
    try:
        return None if value is None else entry.key.kind.convert(value)
    except RefusedError:
        return None


def _close_triangle(given: dict[str, Entry]) -> list[str]:
    """Leave "auto" batch sizes to the triangle once an anchor is known; return those still open."""
    anchors = [given[name] for name in (TRAIN, MICRO) if name in given]
    pending = [name for name in (TRAIN, MICRO, ACCUMULATION)
               if name in given and given[name].pending]  # fmt: skip
    if any(anchor.value is not None for anchor in anchors):
        for name in pending:
            given[name] = replace(
                given[name], pending=False, note="completed by the batch triangle"
            )
        return []
    return pending

"""Reading a configuration: source, overrides, table, aliases, rules, typed sections."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jspeed.config import hf_section
from jspeed.config.aliases import forward
from jspeed.config.auto import AutoFacts, resolve
from jspeed.config.build import derive
from jspeed.config.check import Checker
from jspeed.config.config import Config, from_values
from jspeed.config.problem import config_error
from jspeed.config.rules import broken_rules
from jspeed.config.sections import OptimizerConfig, SchedulerConfig
from jspeed.config.source import apply_overrides, read_source
from jspeed.config.values import Values


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Return the validated configuration that `source` describes.

    Args:
        source: the path of a JSON file (comments and trailing commas allowed), a mapping, or
            JSON encoded with URL-safe base64.
        overrides: texts like `run.steps=10` that replace values of the source; the part behind
            `=` is JSON, or else a string.

    Raises:
        ConfigError: the source cannot be read, or is not a valid configuration. The text has one
            line per problem, each of which starts with the quoted path of a key.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    document, overridden = apply_overrides(read_source(source), overrides)
    document, origins = hf_section.complete(document)
    checker = Checker(document, overridden)
    given, aliases, contradictions = forward(hf_section.noted(checker.given, origins))
    values = Values(given, aliases, checker.patterned)
    resolved = derive(resolve(values, AutoFacts())[0])
    problems = [*checker.problems, *contradictions]
    wrong = {problem.path for problem in problems}
    # A rule judges a key only if the key itself was fine: one message for one mistake.
    problems += [problem for problem in broken_rules(resolved) if problem.path not in wrong]
    if problems:
        raise config_error(problems)
    return from_values(resolved, values)


def resolve_optimizer(type: str, params: Mapping[str, Any]) -> OptimizerConfig:
    """Return the `optimizer` section of `type` and `params` as `load_config` completes it.

    What is complete already comes back as it is.

    Args:
        type: DeepSpeed's name of the optimizer, in any case.
        params: the section's `params`; DeepSpeed's defaults take the place of what is absent.

    Raises:
        ConfigError: a section that `load_config` refuses, or one that
            `Config.require_trainable` refuses: a type or parameter that is not built yet, or an
            "auto" that the section alone does not resolve.
    """
    section = _alone("optimizer", type, params).optimizer
    assert section is not None  # a section without a type is refused
    return section


def resolve_scheduler(type: str, params: Mapping[str, Any]) -> SchedulerConfig:
    """Return the `scheduler` section of `type` and `params` as `load_config` completes it.

    Args, and what is raised: as for `resolve_optimizer`.
    """
    section = _alone("scheduler", type, params).scheduler
    assert section is not None  # a section without a type is refused
    return section


def _alone(name: str, type: str, params: Mapping[str, Any]) -> Config:
    # No rule of these sections looks at the batch size, but every configuration has one.
    config = load_config({"train_batch_size": 1, name: {"type": type, "params": params}})
    config.require_trainable()
    return config

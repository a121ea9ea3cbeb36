"""Reading a configuration: source, overrides, table, aliases, rules, typed sections."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jspeed.config.aliases import forward
from jspeed.config.auto import AutoFacts, resolve
from jspeed.config.build import derive
from jspeed.config.check import Checker
from jspeed.config.config import Config, from_values
from jspeed.config.problem import config_error
from jspeed.config.rules import broken_rules
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
    checker = Checker(document, overridden)
    given, aliases, contradictions = forward(checker.given)
    values = Values(given, aliases, checker.patterned)
    resolved = derive(resolve(values, AutoFacts())[0])
    problems = [*checker.problems, *contradictions]
    wrong = {problem.path for problem in problems}
    # A rule judges a key only if the key itself was fine: one message for one mistake.
    problems += [problem for problem in broken_rules(resolved) if problem.path not in wrong]
    if problems:
        raise config_error(problems)
    return from_values(resolved, values)

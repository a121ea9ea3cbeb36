"""Importing the packages of the extra `data`, with one clear message when they are missing."""

import importlib
from typing import Any

from jspeed.core.errors import MissingExtraError


def import_extra(name: str, *, needed_for: str) -> Any:
    """Returns the module `name`, which the extra `data` installs.

    Args:
      name: an importable module name, such as `"grain"`.
      needed_for: what cannot be done without it, as the beginning of a sentence.

    Raises:
      MissingExtraError: if it is not installed; the text shows the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f'{needed_for} needs the package "{name.partition(".")[0]}", which cannot be imported '
            f'({error}). Install it with: pip install "jspeed[data]"'
        ) from error

"""Settings that a user gives as a Python dictionary on the command line."""

import ast
from typing import Any, Dict

from kd_ext.errors import ConfigError


def parse_overrides(flag: str, text: str) -> Dict[str, Any]:
    """The dictionary that `text`, the value of `flag`, spells.

    Raises:
        ConfigError: it spells none
    """
    try:
        settings = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # unhashable keys, a thousand brackets
        settings = None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        shown = " ".join(text.split())[:200]
        raise ConfigError(f"{flag} {shown}: not a dictionary by names; write it as \"{{'name': 'value'}}\"")
    return settings

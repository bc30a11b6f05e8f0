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
    except (ValueError, SyntaxError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{flag} {text}: not a dictionary; write it as \"{{'name': 'value'}}\"")
    return settings

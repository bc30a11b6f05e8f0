"""Settings that a user gives as a Python dictionary on the command line."""

import ast
from typing import Any, Dict

from kd_ext.errors import ConfigError
from kd_ext.parsing import typed_flags

FLAG = "--model-overrides"


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


def typed_overrides() -> Dict[str, Any]:
    """What ``--model-overrides`` on this process's command line says, without what flags of ours add to it."""
    found = [value for flag, value in typed_flags() if flag == FLAG]
    return parse_overrides(FLAG, found[-1]) if found else {}

"""JSON that somebody brought: whatever is wrong with it is an error of one line."""

import json
import os
from typing import Any, Dict

from kd_ext.errors import ConfigError, in_short

CONFIG = "config.json"


def read_json(path: str) -> Any:
    """What is in a file.

    Raises:
        ConfigError: it cannot be read, or is not JSON
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # a thousand brackets
        said = in_short(error)
        raise ConfigError(f"{path}: damaged, or not JSON ({said}); name a folder that was exported") from error


def read_config(folder: str) -> Dict[str, Any]:
    """A folder's ``config.json``; empty where it has none.

    Raises:
        ConfigError: it cannot be read, or is no JSON of names and values
    """
    path = os.path.join(folder, CONFIG)
    found = read_json(path) if os.path.isfile(path) else {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: has no names and values, as settings have; name a folder that was exported")
    return found

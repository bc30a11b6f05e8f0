"""The model's settings as a checkpoint has them, whichever way its run was started."""

from typing import Any, Dict


def model_settings(state: Dict[str, Any]) -> Any:
    """A Namespace, or a dictionary if Hydra started the run; None if there are none."""
    cfg = state.get("cfg")
    return cfg["model"] if cfg else state.get("args")


def get(settings: Any, key: str) -> Any:
    """The value of a setting; None where there is none of that name."""
    return settings.get(key) if isinstance(settings, dict) else getattr(settings, key, None)

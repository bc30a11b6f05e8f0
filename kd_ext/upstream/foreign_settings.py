"""What a checkpoint's settings name that is not registered here: other projects' criteria, optimizers, flags."""

import logging
from argparse import Namespace
from typing import Any, Dict, Set

from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY

from kd_ext.errors import ConfigError, printable

logger = logging.getLogger(__name__)

# in a checkpoint that was read: the name of its task, where it is not registered and was taken for DEFAULT_TASK
UNREGISTERED_TASK = "unregistered_task"
DEFAULT_TASK = "translation"
# Switches of forks for what a transformer makes of positions. No weight and no name of one shows that they were on.
_POSITIONS = ("use_rope", "rope_args", "yarn_args", "use_alibi", "alibi_args")
_said: Set[str] = set()


def leave_out(path: str, state: Any) -> None:
    """Take them out of what was read from a checkpoint, in place, and say so once (fairseq 0.12.2).

    Before anything else, fairseq looks up all that a checkpoint names, whether it is to be used or not, and ends with
    a KeyError. Of the settings of a task it refuses those that the task does not have.

    Raises:
        ConfigError: by a setting that only a fork has its model computes something else than fairseq's would
    """
    if not isinstance(state, dict):
        return
    if isinstance(state.get("args"), Namespace):
        _from_namespace(path, state, vars(state["args"]))
    if isinstance(state.get("cfg"), dict):
        _from_groups(path, state, state["cfg"])


def _from_namespace(path: str, state: Dict[str, Any], settings: Dict[str, Any]) -> None:
    _check_positions(path, settings, settings.get("arch"))
    for kind, name in ((kind, settings.get(kind)) for kind in REGISTRIES):
        if isinstance(name, str) and name not in REGISTRIES[kind]["registry"]:
            del settings[kind]
            _say(path, f"its {kind} '{name}' is not registered, and left out")
    task = settings.get("task")
    if isinstance(task, str) and task not in TASK_REGISTRY:
        state[UNREGISTERED_TASK], settings["task"] = task, DEFAULT_TASK
        _say(path, f"its task '{task}' is not registered, and taken for '{DEFAULT_TASK}'")


def _from_groups(path: str, state: Dict[str, Any], groups: Dict[str, Any]) -> None:
    model = groups.get("model")
    model = vars(model) if isinstance(model, Namespace) else model
    if isinstance(model, dict):
        _check_positions(path, model, model.get("_name") or model.get("arch"))
    for kind in REGISTRIES:
        name = _name(groups.get(kind))
        if isinstance(name, str) and name not in REGISTRIES[kind]["registry"]:
            groups[kind] = None
            _say(path, f"its {kind} '{name}' is not registered, and left out")
    task = groups.get("task")
    if not isinstance(task, dict):
        return
    if isinstance(_name(task), str) and _name(task) not in TASK_REGISTRY:
        state[UNREGISTERED_TASK], task["_name"] = task["_name"], DEFAULT_TASK
        _say(path, f"its task '{state[UNREGISTERED_TASK]}' is not registered, and taken for '{DEFAULT_TASK}'")
    known = TASK_DATACLASS_REGISTRY.get(task.get("_name"))
    if known is not None:
        unknown = [key for key in task if key not in known.__dataclass_fields__]
        for key in unknown:
            del task[key]
        if unknown:
            _say(path, f"the task '{task['_name']}' has no {', '.join(map(str, unknown))}, which are left out")


def _check_positions(path: str, settings: Dict[str, Any], arch: Any) -> None:
    if not isinstance(arch, str) or not arch.startswith("transformer"):
        return
    for name in _POSITIONS:
        for key in (name, f"encoder_{name}", f"decoder_{name}"):
            if settings.get(key):
                raise ConfigError(
                    f"{path}: its {arch} was trained with {key}={settings[key]!r}, a fork's, by which the same weights "
                    "compute something else than in fairseq's; it can be used by that fork alone"
                )


def _name(settings: Any) -> Any:
    return settings.get("_name") if isinstance(settings, dict) else settings


def _say(path: str, what: str) -> None:
    if (text := f"{path}: {printable(what)}") not in _said:
        _said.add(text)
        logger.warning(text)

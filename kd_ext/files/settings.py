"""The settings in a checkpoint: plain data, of which nothing reaches out of the file."""

import collections
import re
from argparse import Namespace
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
from omegaconf import OmegaConf

from kd_ext.errors import ConfigError
from kd_ext.modules.recurrent_stack import MOST_LAYERS

DEEPEST = 50  # fairseq's go four deep
MOST_THINGS = 300_000  # in a whole checkpoint, tensors counted once
_PARTS = ("cfg", "args")
_PLAIN = (bool, int, float, complex, str, bytes, np.generic, type(None))
_CONTAINERS = (dict, list, tuple, set)
_REFERENCE = re.compile(r"\$\{(\w+)\.(\w+)\}")
# what fairseq looks up in a registry, or else takes for the name of a file of settings
_NAMES = ("arch", "task", "criterion", "optimizer", "lr_scheduler", "bpe", "tokenizer", "scoring", "simul_type")


class Setting(NamedTuple):
    """Where a value was found: the file, and the setting's name with the names of what it is in."""

    path: str
    name: str


# the texts in the settings of every checkpoint that was read, by which a message can say where one is from
_origins: "collections.OrderedDict[str, Setting]" = collections.OrderedDict()
_MOST_ORIGINS = 100_000


def origin(text: str) -> Optional[Setting]:
    """The setting with this text, of those in the checkpoints that were read; of several the last."""
    return _origins.get(text)


_WRAPPED = "module."  # by DistributedDataParallel


def check(path: str, state: Any) -> None:
    """See that what was read from a checkpoint is as :func:`check_size` has it, and its settings are plain data.

    Also that its weights have the names that a model gives them.

    A reference to another setting in the same file (``${common.seed}``) is understood by omegaconf. All others would
    look elsewhere: in the environment, in a file, in each other without end.

    Args:
        path: of the file, for the messages
        state: what was in it

    Raises:
        ConfigError: one line that names the file and the setting
    """
    check_size(path, state)
    if isinstance(state, dict):
        for part in _PARTS:
            _check_settings(path, part, state.get(part))
        weights = state.get("model")
        if isinstance(weights, dict) and weights and all(str(name).startswith(_WRAPPED) for name in weights):
            raise ConfigError(
                f"{path}: its weights are those of a wrapper, with names that begin with '{_WRAPPED}'; save those of "
                "the model in it, as of model.module"
            )


def check_size(path: str, content: Any) -> None:
    """See that what was read from a file is no deeper and holds no more than a checkpoint.

    Raises:
        ConfigError: it is, or does
    """
    for number, (name, _, depth) in enumerate(_walk("", content)):
        if depth > DEEPEST:
            raise ConfigError(f"{path}: refused, {_top(name)} is nested more than {DEEPEST} deep")
        if number > MOST_THINGS:
            raise ConfigError(f"{path}: refused, it holds more than {MOST_THINGS:,} things, and no checkpoint does")


def _check_settings(path: str, part: str, settings: Any) -> None:
    if settings is not None and not isinstance(_opened(settings), (dict, Namespace)):
        raise ConfigError(f"{path}: refused, its {part} is a {type(settings).__name__} in place of settings")
    for name, value, _ in _walk(part, settings):
        opened = _opened(value)
        if not isinstance(opened, (*_PLAIN, *_CONTAINERS, Namespace)) or callable(opened):
            raise ConfigError(f"{path}: refused, its setting {name} is a {type(value).__name__}, which no setting is")
        if isinstance(opened, Namespace):
            odd = [key for key in vars(opened) if not isinstance(key, str) or key.startswith("__")]
            if odd:
                raise ConfigError(f"{path}: refused, its {name} has a setting {odd[0]!r}, which no setting is called")
        if isinstance(value, int) and value > MOST_LAYERS and name.endswith(("_layers", "_stacking")):
            raise ConfigError(f"{path}: refused, its setting {name} is {value}, and no model is as deep as that")
        if isinstance(value, str):
            _check_text(path, part, name, value, settings)
            _remember(value, Setting(path, name))


def _check_text(path: str, part: str, name: str, text: str, settings: Any) -> None:
    if "${" in text and not _is_reference_inside(text, settings):
        raise ConfigError(
            f"{path}: refused, its setting {name} is {shown(text)}, which refers to what is not in the file"
        )
    if part == "args" and name[len("args.") :] in _NAMES and not re.fullmatch(r"[\w.+-]*", text):
        raise ConfigError(f"{path}: refused, its setting {name} is {shown(text)}, which is no name")


def _is_reference_inside(text: str, settings: Any) -> bool:
    """Whether a text is a reference to one value of the same settings, and no further."""
    found = _REFERENCE.fullmatch(text)
    if found is None or isinstance(settings, Namespace):
        return found is not None  # a flat Namespace is sorted into groups first
    group = _opened(_opened(settings).get(found[1]))
    value = _opened(group).get(found[2], group) if isinstance(group, dict) else group
    return isinstance(value, _PLAIN) and "${" not in str(value)


def _remember(text: str, setting: Setting) -> None:
    _origins[text] = setting
    _origins.move_to_end(text)
    if len(_origins) > _MOST_ORIGINS:
        _origins.popitem(last=False)


def _opened(value: Any) -> Any:
    """What an object of omegaconf holds, its references as they are."""
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


def _walk(name: str, value: Any) -> Iterator[Tuple[str, Any, int]]:
    """Every value in `value`, and itself, with its name and how deep it lies; no recursion, whose depth is limited."""
    waiting: List[Tuple[str, Any, int]] = [(name, value, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        yield name, value, depth
        value = _opened(value)
        inside: Dict[Any, Any] = {}
        if isinstance(value, (dict, Namespace)):
            inside = value if isinstance(value, dict) else vars(value)
            waiting += [(name, key, depth + 1) for key in inside if not isinstance(key, str) or "${" in key]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(name, x, depth + 1) for x in value]
        waiting += [(f"{name}.{key}" if name else str(key), x, depth + 1) for key, x in inside.items()]


def _top(name: str) -> str:
    return ".".join(name.split(".")[:3])[:100] or "what it holds"


def shown(text: str) -> str:
    """A text as a message quotes it: on one line, and not all of a long one."""
    return repr(text if len(text) <= 80 else text[:77] + "...")

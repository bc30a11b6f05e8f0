"""A model's settings in a file beside its weights: numbers where numbers belong, and no larger than the weights."""

import argparse
import contextlib
import io
import numbers
import re
from typing import Any, Dict

from omegaconf import OmegaConf
from torch import Tensor

from kd_ext.errors import ConfigError
from kd_ext.files.settings import shown

# what a setting may be whatever the weights are: those that a class does not read may be anything of a usual size
_WIDTH, _LAYERS = 4096, 100
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def check_model_settings(path: str, settings: Any, weights: Any) -> None:
    """See that a model can be built from a file's settings in the time and memory that its weights take.

    Args:
        settings: of the model, a Namespace or a dictionary
        weights: tensors by name

    Raises:
        ConfigError: a number is something else, or is far from all that the weights have; before anything is built
    """
    if OmegaConf.is_config(settings):
        settings = OmegaConf.to_container(settings, resolve=False)
    values = vars(settings) if isinstance(settings, argparse.Namespace) else settings or {}
    tensors: Dict[Any, Any] = weights if isinstance(weights, dict) else {}
    widest = max((size for x in tensors.values() if isinstance(x, Tensor) for size in x.shape), default=_WIDTH)
    depth = 1 + max((int(n) for name in tensors for n in _LAYER.findall(str(name)) if len(n) < 6), default=0)
    flags = _flags(values.get("_name") or values.get("arch"))
    for key, value in values.items():
        is_number = value is None or isinstance(value, numbers.Real) or _is_reference(value)
        if key in flags and flags[key].type in (int, float) and not is_number:
            raise ConfigError(f"{path}: refused, its setting {key} is {shown(str(value))}, which is no number")
        if key in flags and flags[key].nargs == 0 and not is_number:  # a switch; "no" would switch it on
            raise ConfigError(f"{path}: refused, its setting {key} is {shown(str(value))}, and not True or False")
        for end, usual, found in (("_dim", _WIDTH, widest), ("_layers", _LAYERS, depth)):
            if isinstance(value, int) and str(key).endswith(end) and value > max(usual, found):
                raise ConfigError(
                    f"{path}: refused, its setting {key} is {value}, and its weights have {found} at most"
                )


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("${")


def _flags(name: Any) -> Dict[Any, argparse.Action]:
    """The flags of an architecture, by the names of the settings."""
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY  # models are registered after every touch

    model = (ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)) if isinstance(name, str) else None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    if model is not None:
        with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
            model.add_args(parser)
    return {action.dest: action for action in parser._actions}

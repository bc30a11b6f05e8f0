"""Whether a checkpoint's weights compute in a run's model what they computed where they were trained."""

import argparse
import logging
from argparse import Namespace
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.models import build_model as build_registered
from omegaconf import OmegaConf
from torch import Tensor

from kd_ext.errors import ConfigError
from kd_ext.models.extension_flags import SIDES, activation_key
from kd_ext.modules.adapter import AdapterSet
from kd_ext.modules.random_state import random_state_kept

logger = logging.getLogger(__name__)

# Of the largest log-probability: two ways of computing one function in float32 differ by less.
TOLERANCE = 1e-6

# Log-probabilities by which adapter is active: (side, id), or None for none of them
_Outputs = Dict[Optional[Tuple[str, str]], Tensor]


class Probe(NamedTuple):
    """What two models are compared on.

    Attributes:
        task: what models are built for
        weights: of the checkpoint, by name
        inputs: arguments of the models' forward; None: nothing is known that they could be asked
    """

    task: Any
    weights: Dict[str, Tensor]
    inputs: Optional[Dict[str, Any]]


def check_same_function(path: str, saved: Any, settings: Any, liberally: bool, probe: Probe) -> None:
    """Refuse settings under which a checkpoint's weights compute something else than under its own.

    There is no list of settings that matter. If any of those that the two models read differ, both are built on the
    CPU, one after the other, get the weights, and are asked for the same batch, with no adapter and with each that
    both have. So dropout, or the path of initial embeddings, may differ.

    Args:
        path: of the checkpoint, for the messages
        saved: its model's settings
        settings: those of the model that its weights are loaded into
        liberally: whether they are loaded as far as they fit

    Raises:
        ConfigError: they compute something else; names the settings that are the reason
    """
    theirs, ours = _normalized(saved, _name(settings)), _normalized(settings, _name(settings))
    for namespace in (theirs, ours):
        for side in SIDES:
            setattr(namespace, activation_key(side), None)
    for key in ("encoder_layers_to_keep", "decoder_layers_to_keep"):  # a flag that asks for another function
        if getattr(ours, key, None) is not None:
            setattr(theirs, key, getattr(ours, key))
    keys = sorted(
        key
        for key in settings_read(ours) | settings_read(theirs)
        if getattr(ours, key, None) != getattr(theirs, key, None)
    )
    if not keys:
        return
    reference, outputs = _outputs(theirs, False, probe), _outputs(ours, liberally, probe)
    if not reference or outputs is None:
        logger.warning("cannot tell whether the weights of %s compute the same here: other %s", path, ", ".join(keys))
        return
    if any(bool(found.isnan().any()) for found in reference.values()):
        raise ConfigError(f"{path}: its weights give what is not a number; name a checkpoint that was saved before")
    if _agree(reference, outputs):
        return

    start = _normalized({**vars(theirs), "arch": _name(ours), "_name": _name(ours)}, _name(ours))
    keys = [key for key in keys if getattr(start, key, None) != getattr(ours, key, None)]

    def reasons(among: List[str]) -> List[str]:
        """Of these settings those that change what is computed, found by halves."""
        changed = Namespace(**{**vars(start), **{key: getattr(ours, key, None) for key in among}})
        outputs, half = _outputs(changed, liberally, probe), len(among) // 2
        if outputs is not None and _agree(reference, outputs):
            return []
        found = reasons(among[:half]) + reasons(among[half:]) if half > 0 else []
        # what cannot be built needs another setting beside it
        return found or (among if outputs is not None else [])

    raise ConfigError(_message(path, theirs, ours, reasons(keys)))


def _message(path: str, theirs: Namespace, ours: Namespace, reasons: List[str]) -> str:
    if not reasons:
        return f"--arch {_name(ours)}: the weights of {path} compute something else in it than in {_name(theirs)}"
    given, wanted = (", ".join(_shown(x, key) for key in reasons) for x in (ours, theirs))
    return (
        f"{given}: {path} was trained with {wanted}, and its weights compute something else now; give what it was "
        "trained with"
    )


def _shown(settings: Namespace, key: str) -> str:
    flag, value = f"--{key.replace('_', '-')}", getattr(settings, key, None)
    if value is True:
        return flag
    return f"{flag} {value}" if value else f"no {flag}"


def _name(settings: Any) -> str:
    get = settings.get if isinstance(settings, dict) or OmegaConf.is_config(settings) else vars(settings).get
    return get("_name", None) or get("arch", None)


def _is_registered(name: Any) -> bool:
    return name in ARCH_MODEL_REGISTRY or name in MODEL_DATACLASS_REGISTRY


def _normalized(settings: Any, instead: str) -> Namespace:
    """A copy with the defaults of its architecture, or, where that is not registered, of the one `instead`."""
    if OmegaConf.is_config(settings):
        settings = OmegaConf.to_container(settings)
    values = settings if isinstance(settings, dict) else vars(settings)
    name = _name(settings)
    name = name if _is_registered(name) else instead
    copied = Namespace(**{**{key: value for key, value in values.items() if value is not None}, "_name": name})
    if name in ARCH_CONFIG_REGISTRY and name not in MODEL_DATACLASS_REGISTRY:
        ARCH_CONFIG_REGISTRY[name](copied)
    return copied


def settings_read(settings: Any) -> Set[str]:
    """The names of the settings that a model class reads: its flags, and what its architecture sets beside them."""
    name = _name(settings)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    (ARCH_MODEL_REGISTRY[name] if name in ARCH_MODEL_REGISTRY else MODEL_REGISTRY[name]).add_args(parser)
    defaults = Namespace()
    if name in ARCH_CONFIG_REGISTRY and name not in MODEL_DATACLASS_REGISTRY:
        ARCH_CONFIG_REGISTRY[name](defaults)
    return {action.dest for action in parser._actions} | set(vars(defaults))


def _outputs(settings: Namespace, liberally: bool, probe: Probe) -> Optional[_Outputs]:
    """Of a model built from `settings`: none if the weights do not fit it; None if it cannot be built or asked."""
    copied = Namespace(**{key: value for key, value in vars(settings).items() if value is not None})
    if liberally and hasattr(copied, "load_checkpoint_liberally"):
        copied.load_checkpoint_liberally = True
    fits = True
    try:
        with random_state_kept(), _silence(), torch.no_grad():
            model = build_registered(copied, probe.task)
            fits = False
            model.load_state_dict(dict(probe.weights), strict=True, model_cfg=copied)
            fits = True
            return None if probe.inputs is None else _ask(model.eval(), probe.inputs)
    except Exception:  # whatever a model class answers to settings or weights that do not suit it
        return None if fits else {}


def _ask(model: Any, inputs: Dict[str, Any]) -> _Outputs:
    def probabilities() -> Tensor:
        return model.get_normalized_probs(model(**inputs), log_probs=True)

    sets = [(side, m) for side in SIDES for m in getattr(model, side, model).modules() if isinstance(m, AdapterSet)]
    if not sets:
        return {None: probabilities()}
    found: _Outputs = {}
    for active in dict.fromkeys([None, *((side, name) for side, adapters in sets for name in adapters.ids)]):
        model.activate_adapter(**({active[0]: active[1]} if active else {}))
        found[active] = probabilities()
    return found


def _agree(reference: _Outputs, outputs: _Outputs) -> bool:
    pairs = [(reference[key], outputs[key]) for key in reference if key in outputs]
    return bool(pairs) and all(
        a.shape == b.shape and torch.allclose(a, b, 0, TOLERANCE * float(a.abs().max()), equal_nan=True)
        for a, b in pairs
    )


@contextmanager
def _silence() -> Iterator[None]:
    """What is built and loaded only to be compared says nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)

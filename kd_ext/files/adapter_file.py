"""A file of one adapter, as ``export`` writes it, and how it is told from anything else."""

import logging
import re
from typing import Any, Dict, List, NoReturn, Optional

import torch
from torch import Tensor, nn

from kd_ext.errors import ConfigError
from kd_ext.files.base_settings import without_implied
from kd_ext.files.reading import explained
from kd_ext.files.safe_loading import load
from kd_ext.files.settings import check_size
from kd_ext.models.extension_flags import SIDES, is_id
from kd_ext.models.saved_settings import get
from kd_ext.modules.adapter import ACTIVATIONS, Adapter, adapter_of

logger = logging.getLogger(__name__)

FORMAT = "kd_ext adapter 1"
# per side: what all adapters of a side have in common, saved as text
SIDE_SETTINGS = ("adapter_reduction_factor", "adapter_use_gating")
SHARED_SETTINGS = ("adapter_activation_fn",)
_ENTRIES = {"format": str, "id": str, "base": str, "settings": dict, "tensors": dict, "base_settings": dict}
_NEW_ENTRIES = {"base_settings"}  # which files of earlier releases do not have
_VALUES = {
    "adapter_reduction_factor": re.compile("[1-9][0-9]{0,5}"),
    "adapter_use_gating": re.compile("True|False"),
    "adapter_activation_fn": re.compile("|".join(ACTIVATIONS)),
}


def read(path: str) -> Dict[str, Any]:
    """The content of a file that ``export`` wrote; whether it goes with a base is for :func:`check_fits`.

    Raises:
        ConfigError: there is none, or it is something else
    """
    try:
        with explained(path, "file of adapters"):
            file = load(path)
            check_size(path, file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one that export wrote") from None
    if not isinstance(file, dict) or file.get("format") != FORMAT:
        raise ConfigError(f"{path}: not a file of adapters; name one that export wrote")
    _check_entries(path, file)
    _check_settings(path, file["settings"])
    return file


def setting_keys(sides: List[str]) -> List[str]:
    """The settings in a file of adapters on these sides."""
    return [f"{side}_{key}" for side in sides for key in SIDE_SETTINGS] + list(SHARED_SETTINGS)


def _check_entries(path: str, file: Dict[str, Any]) -> None:
    odd = sorted(map(str, (set(file) ^ set(_ENTRIES)) - (_NEW_ENTRIES - set(file))))
    if odd:
        _refuse(path, f"{odd[0][:80]!r} is {'missing' if odd[0] in _ENTRIES else 'in it'}")
    for name, kind in _ENTRIES.items():
        if name in file and not isinstance(file[name], kind):
            _refuse(path, f"its {name} is a {type(file[name]).__name__}")
    if not is_id(file["id"]):
        _refuse(path, f"its id {file['id'][:80]!r} is no id of an adapter")
    if not re.fullmatch("[0-9a-f]{16}", file["base"]):
        _refuse(path, f"its base {file['base'][:80]!r} is no fingerprint")


def check_base_settings(path: str, file: Dict[str, Any], base: str, deciding: Dict[str, str]) -> None:
    """See that an adapter was trained on a base that computes what this one does, as far as settings decide it.

    Args:
        file: from :func:`read`
        base: the path of the base, for the message
        deciding: the base's settings, from :func:`kd_ext.files.base_settings.deciding`

    Raises:
        ConfigError: a setting is another
    """
    if "base_settings" not in file:
        logger.warning(
            "%s: an earlier release wrote it, without its base's settings; see that %s has those of its training",
            *(path, base),
        )
        return
    trained = without_implied(file["base_settings"])  # files of earlier releases have what is implied, or lack it
    for key in sorted({*trained, *deciding}, key=str):
        if trained.get(key) != deciding.get(key):
            theirs, ours = (str(x.get(key, "off"))[:80] for x in (trained, deciding))
            raise ConfigError(
                f"{path}: its adapter {file['id']} was trained on a base with {str(key)[:80]} {theirs}, and {base} has "
                f"{ours}: the same weights compute something else there; name the checkpoint that it was trained on"
            )


def _check_settings(path: str, settings: Dict[Any, Any]) -> None:
    expected = setting_keys(_sides(settings))
    odd = [key for key in settings if key not in expected] + [key for key in expected if key not in settings]
    if odd:
        _refuse(path, f"the setting {str(odd[0])[:80]!r} is {'in it' if odd[0] in settings else 'missing'}")
    for key, text in settings.items():
        pattern = next(pattern for name, pattern in _VALUES.items() if key.endswith(name))
        if not isinstance(text, str) or not pattern.fullmatch(text):
            _refuse(path, f"its setting {key} is {str(text)[:80]!r}")


def _sides(settings: Dict[Any, Any]) -> List[str]:
    return [side for side in SIDES if any(f"{side}_{key}" in settings for key in SIDE_SETTINGS)]


def check_fits(path: str, file: Dict[str, Any], model: Dict[str, Tensor], base_settings: Any) -> None:
    """See that a file holds the tensors of its adapter for a base, all of them and no others.

    Args:
        file: from :func:`read`
        model: the base's weights
        base_settings: the base's settings

    Raises:
        ConfigError: it does not
    """
    tensors, settings, sides = file["tensors"], file["settings"], _sides(file["settings"])
    if not sides:
        _refuse(path, "it is of no side")
    expected: Dict[str, torch.Size] = {}
    for side in sides:
        width = _width(path, side, model, base_settings)
        factor = int(settings[f"{side}_adapter_reduction_factor"])
        if factor > width:
            _refuse(path, f"its setting {side}_adapter_reduction_factor is {factor}, and the base is {width} wide")
        gated = settings[f"{side}_adapter_use_gating"] == "True"
        adapter = Adapter(width, width // factor, settings["adapter_activation_fn"], nn.Identity(), gated)
        for depth in range(_depths(side, model, base_settings)):
            start = f"{side}.layers.{depth}.adapters.{file['id']}."
            expected.update({start + name: tensor.shape for name, tensor in adapter.state_dict().items()})
    odd = [name for name in tensors if name not in expected]
    if odd:
        _refuse(path, f"{str(odd[0])[:80]!r} is no tensor of an adapter {file['id']} for this base")
    missing = [name for name in expected if name not in tensors]
    if missing:
        _refuse(path, f"{missing[0]} is missing, which an adapter for this base has")
    for name, shape in expected.items():
        _check_tensor(path, name, tensors[name], shape)


def _check_tensor(path: str, name: str, tensor: Any, shape: torch.Size) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        _refuse(path, f"{name} is no plain tensor")
    if tensor.shape != shape:
        _refuse(path, f"{name} has the shape {tuple(tensor.shape)}, and in an adapter for this base {tuple(shape)}")
    if not tensor.is_floating_point():
        _refuse(path, f"{name} is of {tensor.dtype}, which is not floating")
    if not torch.isfinite(tensor.float()).all():
        _refuse(path, f"{name} has values that are not finite")


def _depths(side: str, model: Dict[str, Tensor], settings: Any) -> int:
    """How often layers are applied on a side: as often as they are stacked, or as there are layers."""
    stacked: Optional[int] = get(settings, f"{side}_recurrent_stacking")
    pattern = re.compile(rf"{side}\.layers\.(\d+)\.")
    found = {match[1] for match in map(pattern.match, model) if match and adapter_of(match.string) is None}
    return stacked or len(found)


def _width(path: str, side: str, model: Dict[str, Tensor], settings: Any) -> int:
    width, norm = get(settings, f"{side}_embed_dim"), model.get(f"{side}.layers.0.final_layer_norm.weight")
    if not isinstance(width, int) or (norm is not None and norm.shape != (width,)):
        raise ConfigError(
            f"{path}: its base has weights that are not {side}_embed_dim {width} wide, as its settings say"
        )
    return width


def _refuse(path: str, reason: str) -> NoReturn:
    raise ConfigError(f"{path}: refused, {reason}; export writes no such file")

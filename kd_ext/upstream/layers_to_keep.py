"""``--encoder-layers-to-keep 0,2`` and the decoder's: to begin with some layers of a model, as LayerDrop's users do."""

import functools
import logging
import re
from contextlib import nullcontext
from typing import Any, Dict, List, Optional

from fairseq import checkpoint_utils
from fairseq.models.transformer.transformer_config import EncDecBaseConfig
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from kd_ext.errors import ConfigError

logger = logging.getLogger(__name__)


def apply() -> None:
    """Take the flags as text, and prune what is to be pruned alone (fairseq 0.12.2).

    Their dataclass calls them lists of numbers, so that the command line makes one of ``0,2``; what builds the model
    and what prunes the weights split them at commas, and end with an AttributeError. The pruning drops all layers of
    a side that is not named, and prunes again what the run has saved, so that it cannot be gone on with.
    """
    EncDecBaseConfig.__dataclass_fields__["layers_to_keep"].type = Optional[str]  # that of the decoder's, too
    EncDecBaseConfig.__annotations__["layers_to_keep"] = Optional[str]
    original = checkpoint_utils.prune_state_dict
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def prune_state_dict(state_dict, model_cfg):
        if any(_kept(model_cfg, side) for side in ("encoder", "decoder")):
            _complete(model_cfg, state_dict)
        return original(state_dict, model_cfg)

    prune_state_dict._kd_ext = True
    checkpoint_utils.prune_state_dict = prune_state_dict


def _kept(cfg: Any, side: str) -> Optional[str]:
    return getattr(cfg, f"{side}_layers_to_keep", None)


def _complete(cfg: Any, weights: Dict[str, Tensor]) -> None:
    """Keep all layers of a side that is not named, or that has as many as are kept, and not those: it is pruned.

    Raises:
        ConfigError: a layer is not there
    """
    for side in ("encoder", "decoder"):
        there, kept = _layers(weights, side), _kept(cfg, side)
        asked = {int(layer) for layer in kept.split(",")} if kept else set(there)
        if there and not asked <= set(there):
            flag = f"--{side}-layers-to-keep {kept}"
            if len(asked) != len(there):
                raise ConfigError(f"{flag}: the weights have the layers 0 to {there[-1]}; name some of them")
            logger.warning("%s: the weights have %d layers, as many; all are taken, as pruned before", flag, len(there))
        if len(asked) == len(there) and there:
            with open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext():
                setattr(cfg, f"{side}_layers_to_keep", ",".join(map(str, there)))


def _layers(weights: Dict[str, Tensor], side: str) -> List[int]:
    found = (re.match(rf"{side}\.layers\.(\d+)\.", name) for name in weights)
    return sorted({int(match[1]) for match in found if match})

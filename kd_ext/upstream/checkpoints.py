"""What fairseq's checkpoints may refer to, and that all else is refused."""

import _codecs
import argparse
import collections
import typing
from types import ModuleType

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.distributed.utils import _TensorPlaceholder
from fairseq.logging import meters
from fairseq.models.speech_to_text import xm_transformer
from fairseq.models.text_to_speech import vocoder
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from kd_ext.errors import ConfigError
from kd_ext.files import safe_loading, settings
from kd_ext.upstream.foreign_settings import leave_out

STRIPPED = "stripped"  # of a checkpoint that was read: the optimizer's part of it was taken out
# what fairseq's first releases had in its place
_OF_FIRST_RELEASES = (("best_loss", "optimizer"), ("epoch", "batch_offset", "val_loss"))


class _SafelyLoadingTorch(ModuleType):
    """torch, but for ``load``."""

    @staticmethod
    def load(file, map_location="cpu", **_):
        # what else fairseq may be made to ask for is to load unsafely
        state = safe_loading.load(file, map_location)
        path = str(getattr(file, "name", file))
        if isinstance(state, dict) and state and all(map(torch.is_tensor, state.values())):
            raise ConfigError(f"{path}: not a checkpoint of fairseq: it holds weights alone, without settings")
        settings.check(path, state)
        leave_out(path, state)
        _fill_in(state)
        return state

    def __getattr__(self, name):
        return getattr(torch, name)


def _fill_in(state: typing.Any) -> None:
    """Let a file of settings and weights alone be read: fairseq (0.12.2) looks up the rest, whatever it is read for."""
    if not isinstance(state, dict) or "model" not in state:
        return
    history, extra = (all(name in state for name in names) for names in _OF_FIRST_RELEASES)
    if not state.get("optimizer_history") and not history:
        state["optimizer_history"] = [{"optimizer_name": None, "lr_scheduler_state": {}, "num_updates": 0}]
        state[STRIPPED] = True
    if state.get("extra_state") is None and not extra:
        state["extra_state"] = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}


def apply() -> None:
    """Let fairseq's own checkpoints be read, and refuse every other global, with every torch.

    fairseq 0.12.2 calls ``torch.load`` in a way that runs whatever code a file carries, up to torch 2.5, and later
    ones too where TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, as advice on fairseq's errors has it: its module of
    checkpoints is given another ``load``. So are those of models that load what a checkpoint's settings name.
    """
    safe_loading.allow(_checkpoint_globals())
    for module in (checkpoint_utils, xm_transformer, vocoder):
        if module.torch is torch:
            module.torch = _SafelyLoadingTorch("torch")


def _checkpoint_globals() -> typing.Dict[str, typing.Any]:
    """By the names that are pickled."""
    listed: typing.Dict[str, typing.Any] = {"typing.Any": typing.Any, "_codecs.encode": _codecs.encode}
    # numpy scalars in meters; numpy 2 moved them from core to _core
    multiarray = (getattr(np, "_core", None) or np.core).multiarray
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        listed[f"{module}._reconstruct"] = multiarray._reconstruct
        listed[f"{module}.scalar"] = multiarray.scalar
    classes = [argparse.Namespace, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    # several workers: the state is sent to the others by pickle, with its configuration as objects
    classes += [DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata, _TensorPlaceholder]
    classes += [collections.defaultdict, dict, list, int]
    # 0.6.2 to 0.9.0 saved their meters as objects, which have numbers and no code; later ones moved the module
    for meter in (meters.AverageMeter, meters.TimeMeter, meters.StopwatchMeter):
        listed.update({f"{module}.{meter.__name__}": meter for module in ("fairseq.meters", "fairseq.logging.meters")})
    listed.update({f"{kind.__module__}.{kind.__qualname__}": kind for kind in classes})
    return listed

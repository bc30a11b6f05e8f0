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
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from kd_ext.files import safe_loading, settings


class _SafelyLoadingTorch(ModuleType):
    """torch, but for ``load``."""

    @staticmethod
    def load(file, map_location="cpu", **_):
        # what else fairseq may be made to ask for is to load unsafely
        state = safe_loading.load(file, map_location)
        settings.check(str(getattr(file, "name", file)), state)
        return state

    def __getattr__(self, name):
        return getattr(torch, name)


def apply() -> None:
    """Let fairseq's own checkpoints be read, and refuse every other global, with every torch.

    fairseq 0.12.2 calls ``torch.load`` in a way that runs whatever code a file carries, up to torch 2.5, and later
    ones too where TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, as advice on fairseq's errors has it: its module of
    checkpoints is given another ``load``.
    """
    safe_loading.allow(_checkpoint_globals())
    if checkpoint_utils.torch is torch:
        checkpoint_utils.torch = _SafelyLoadingTorch("torch")


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
    listed.update({f"{kind.__module__}.{kind.__qualname__}": kind for kind in classes})
    return listed

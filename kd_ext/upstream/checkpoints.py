"""torch >= 2.6 loads only listed globals from a checkpoint: the ones that fairseq writes are listed here."""

import argparse
import collections
import typing

import numpy as np
import torch
from fairseq.distributed.utils import _TensorPlaceholder
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode


def apply() -> None:
    """Let fairseq's own checkpoints be read (torch >= 2.6); every other global stays refused."""
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals(_checkpoint_globals())


def _checkpoint_globals() -> list:
    listed: list = [argparse.Namespace]
    # numpy scalars in meters; torch asks for the pickled name, which numpy 2 moved from core to _core
    multiarray = (getattr(np, "_core", None) or np.core).multiarray
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        listed += [
            (multiarray._reconstruct, f"{module}._reconstruct"),
            (multiarray.scalar, f"{module}.scalar"),
        ]
    listed += [np.ndarray, np.dtype]
    listed += sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}, key=str)
    # several workers: the state is sent to the others by pickle, with its configuration as objects
    listed += [DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata, _TensorPlaceholder]
    listed += [collections.defaultdict, dict, list, int, typing.Any]
    return listed

"""Short names for weights and for dictionaries: equal for equal content, whatever file it came in."""

import hashlib
import re
from typing import Dict, Sequence

import torch
from torch import Tensor

from kd_ext.models.layers import is_dead

# Not weights: fairseq's marker of its checkpoint format, and a buffer that it never sets
_BUFFERS = re.compile(r"\.(version|_float_tensor)$")


def is_weight(name: str) -> bool:
    """Whether a tensor of this name takes part in what a model computes."""
    return not _BUFFERS.search(name) and not is_dead(name)


def model_fingerprint(state_dict: Dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes of all weights: 16 hexadecimal digits.

    Without what takes no part in what the model computes, so that a checkpoint has one fingerprint before and
    after it was loaded into this project's architecture.

    Args:
        state_dict: any dtypes, on any device; the order does not matter
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        if not is_weight(name):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def dictionary_fingerprint(symbols: Sequence[str]) -> str:
    """Of the words in their order: 16 hexadecimal digits. How often they were counted is left out."""
    return hashlib.sha256("\n".join(symbols).encode()).hexdigest()[:16]

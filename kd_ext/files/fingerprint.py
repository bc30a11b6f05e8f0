"""Short names for weights and for dictionaries: equal for equal content, whatever file it came in."""

import hashlib
import re
from operator import itemgetter
from typing import Dict, Iterator, Sequence, Tuple

import torch
from torch import Tensor

from kd_ext.models.layers import is_dead

# Names that fairseq up to 0.8 had: attention's three projections as one, layer norms of an encoder's layer by number
_PROJECTIONS = re.compile(r"(.*attn\.)in_proj_(weight|bias)$")
_LAYER_NORM = re.compile(r"(.*encoder\.layers\.\d+\.)layer_norms\.([01])(\..*)$")
_LAYER_NORMS = ("self_attn_layer_norm", "final_layer_norm")
# Not weights: fairseq's marker of its checkpoint format, and a buffer that it never sets
_BUFFERS = re.compile(r"\.(version|_float_tensor)$")


def is_weight(name: str) -> bool:
    """Whether a tensor of this name takes part in what a model computes."""
    return not _BUFFERS.search(name) and not is_dead(name)


def _of_today(state_dict: Dict[str, Tensor]) -> Iterator[Tuple[str, Tensor]]:
    """Each tensor with the name that fairseq gives it now, as it does when it loads a model."""
    for name, tensor in state_dict.items():
        projections, norm = _PROJECTIONS.match(name), _LAYER_NORM.match(name)
        if projections and tensor.dim() > 0 and tensor.size(0) % 3 == 0:
            for part, values in zip("qkv", tensor.chunk(3)):
                yield f"{projections[1]}{part}_proj.{projections[2]}", values
        elif norm:
            yield f"{norm[1]}{_LAYER_NORMS[int(norm[2])]}{norm[3]}", tensor
        else:
            yield name, tensor


def model_fingerprint(state_dict: Dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes of all weights: 16 hexadecimal digits.

    Without what takes no part in what the model computes, so that a checkpoint has one fingerprint before and
    after it was loaded into this project's architecture, in the layout of whichever release.

    Args:
        state_dict: any dtypes, on any device; the order does not matter
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_of_today(state_dict), key=itemgetter(0)):
        if not is_weight(name):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def dictionary_fingerprint(symbols: Sequence[str]) -> str:
    """Of the words in their order: 16 hexadecimal digits. How often they were counted is left out."""
    return hashlib.sha256("\n".join(symbols).encode()).hexdigest()[:16]

"""Recurrent stacking written out: one layer's weights at every depth."""

import re
from typing import Dict

from torch import Tensor

from kd_ext.modules.adapter import adapter_of


def unrolled(weights: Dict[str, Tensor], side: str, depths: int) -> Dict[str, Tensor]:
    """The weights of a side with ``depths`` layers in place of one that is applied so often.

    Args:
        weights: by name; adapters have a depth of their own already
        side: ``encoder`` or ``decoder``
        depths: 0: the side is not stacked

    Returns:
        the same tensors under more names, not copied: torch writes what is one storage once
    """
    first = re.compile(rf"{side}\.layers\.0\.(.*)")
    found = dict(weights)
    for name, tensor in weights.items():
        match = first.fullmatch(name)
        if match and adapter_of(name) is None:
            found.update({f"{side}.layers.{depth}.{match[1]}": tensor for depth in range(1, depths)})
    return found

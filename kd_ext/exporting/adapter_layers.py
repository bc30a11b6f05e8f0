"""An adapter as what it is behind a pre-norm layer: one more layer, whose attentions add nothing."""

import re
from typing import Dict, List

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_ext.modules.adapter import adapter_of


def without_adapters(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if adapter_of(name) is None}


def with_adapters_as_layers(weights: Dict[str, Tensor], side: str, adapter_id: str) -> Dict[str, Tensor]:
    """The weights of a pre-norm side with a layer after each, which computes what the adapter behind it does.

    Its attentions end in zeros, so that they add nothing. Its feed-forward part is the adapter, filled up with zeros to
    the width that all of the side have, which is the adapter's bottleneck where that is more.

    Args:
        weights: by name, the side's layers one by one
        side: ``encoder`` or ``decoder``
        adapter_id: of an adapter without a gate, of the model's activation

    Returns:
        the same without the side's adapters, with twice as many layers
    """
    pattern = re.compile(rf"{side}\.layers\.(\d+)\.(.*)")
    layers: Dict[int, Dict[str, Tensor]] = {}
    adapters: Dict[int, Dict[str, Tensor]] = {}
    found: Dict[str, Tensor] = {}
    start = f"adapters.{adapter_id}."
    for name, tensor in weights.items():
        match = pattern.fullmatch(name)
        if match is None:
            found[name] = tensor
        elif adapter_of(name) is None:
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        elif adapter_of(name) == (side, adapter_id):
            adapters.setdefault(int(match[1]), {})[match[2][len(start) :]] = tensor
    sizes: List[int] = [x["fc1.bias"].size(0) for x in layers.values()]
    width = max([*sizes, *(x["down.bias"].size(0) for x in adapters.values())])
    for depth, layer in sorted(layers.items()):
        parts = (_widened(layer, width), _as_layer(layer, adapters[depth], width))
        for number, part in enumerate(parts, 2 * depth):
            found.update({f"{side}.layers.{number}.{name}": tensor for name, tensor in part.items()})
    return found


def _as_layer(layer: Dict[str, Tensor], adapter: Dict[str, Tensor], width: int) -> Dict[str, Tensor]:
    """The layer after `layer`, with the same names."""
    neutral = {
        name: torch.ones_like(x) if name.endswith("layer_norm.weight") else torch.zeros_like(x)
        for name, x in layer.items()
    }
    feed_forward = {
        "final_layer_norm.weight": adapter["layer_norm.weight"],
        "final_layer_norm.bias": adapter["layer_norm.bias"],
        "fc1.weight": adapter["down.weight"],
        "fc1.bias": adapter["down.bias"],
        "fc2.weight": adapter["up.weight"],
        "fc2.bias": adapter["up.bias"],
    }
    return _widened({**neutral, **feed_forward}, width)


def _widened(layer: Dict[str, Tensor], width: int) -> Dict[str, Tensor]:
    """A layer with zeros up to a feed-forward part of this width, which add nothing."""
    missing = width - layer["fc1.bias"].size(0)
    if not missing:
        return layer
    return {
        **layer,
        "fc1.weight": F.pad(layer["fc1.weight"], (0, 0, 0, missing)),
        "fc1.bias": F.pad(layer["fc1.bias"], (0, missing)),
        "fc2.weight": F.pad(layer["fc2.weight"], (0, missing)),
    }

"""Recomputing activations in the backward pass, for layers with frozen or shared parameters."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(layer: nn.Module) -> nn.Module:
    """Make `layer` keep its inputs alone, and compute the rest again in the backward pass.

    fairseq's own wrapper (0.12.2) drops the gradient of a layer's parameters when no input has one, as under an
    adapter on a frozen base, and announces a shared parameter to DDP once for each use. torch's non-reentrant
    form does neither.
    """
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return layer

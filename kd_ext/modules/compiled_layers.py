"""The layers of a model, compiled by torch in place."""

from torch import nn


def compile_layers(model: nn.Module) -> int:
    """Compile each layer of an encoder-decoder, for sequences of any length.

    The layers stay what they are: parameters, their names and what is saved do not change. What is around them
    (embeddings, the loop over layers, the loss) runs as before. torch compiles at the first call, and once more where
    a later one differs in kind: in evaluation, in decoding step by step.

    Args:
        model: with layers in ``encoder.layers`` and ``decoder.layers``

    Returns:
        how many there are
    """
    sides = (getattr(model, side, None) for side in ("encoder", "decoder"))
    layers = [layer for side in sides for layer in getattr(side, "layers", [])]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)

"""The layers of a model, compiled by torch in place."""

from typing import Any, Callable, Sequence

import torch
from torch import nn

# torch keeps as many versions of a layer: with and without padding, in training and in evaluation, of the model and of
# its teachers
VERSIONS = 64
_ATTENTION = ("need_attn", "need_head_weights")


def compile_layers(model: nn.Module, gives_attention: bool = True) -> int:
    """Compile each layer of an encoder-decoder, for sequences of any length.

    The layers stay what they are: parameters, their names and what is saved do not change. What is around them
    (embeddings, the loop over layers, the loss) runs as before, and so does decoding step by step, where each layer
    would be compiled by itself and for each kind of step. torch compiles when a layer is first called.

    Args:
        model: with layers in ``encoder.layers`` and ``decoder.layers``
        gives_attention: its decoder is asked where it looks; fairseq asks one layer, which is then a kind of its own

    Returns:
        how many there are
    """
    import torch._dynamo  # not at the top: it takes seconds

    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(VERSIONS, getattr(torch._dynamo.config, limit)))
    _tell_equal_sizes_apart()
    sides = (getattr(model, side, None) for side in ("encoder", "decoder"))
    layers = [layer for side in sides for layer in getattr(side, "layers", [])]
    for layer in layers:
        # where torch's own Module.compile puts it, and does not copy or save it
        layer._compiled_call_impl = _unless_incremental(layer, () if gives_attention else _ATTENTION)
    return len(layers)


def _tell_equal_sizes_apart() -> None:
    """Else a first batch with as many sentences, or tokens, as the model is wide has a version of its own."""
    from torch.fx.experimental import _config

    if hasattr(_config, "use_duck_shape"):  # older ones have no such setting
        _config.use_duck_shape = False


def _unless_incremental(layer: Any, never: Sequence[str]) -> Callable[..., Any]:
    compiled = torch.compile(layer._call_impl, dynamic=True)

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        # of a decoder's layer the third after x
        state = args[2] if len(args) > 2 else kwargs.get("incremental_state")
        if state is not None:
            return layer._call_impl(x, *args, **kwargs)
        kwargs.update({name: False for name in never if name in kwargs})
        # else a first layer, of a transposed x, is one more version, and so is a mask that is cut out of a larger one
        mask = kwargs.get("self_attn_mask")
        if mask is not None:
            kwargs["self_attn_mask"] = mask.clone(memory_format=torch.contiguous_format)
        return compiled(x.contiguous(), *args, **kwargs)

    return call


def seconds_spent() -> float:
    """How long torch has compiled so far in this process."""
    from torch._dynamo.utils import compilation_time_metrics

    whole = [sum(times) for name, times in compilation_time_metrics.items() if name.endswith("compile_inner")]
    return sum(whole)

"""From the features of a fairseq decoder to its logits, where that is nothing but a matrix product."""

import inspect
from typing import Any, Callable

from fairseq.distributed import DistributedTimeoutWrapper, LegacyDistributedDataParallel, ModuleProxyWrapper
from fairseq.models import BaseFairseqModel, FairseqDecoder
from fairseq.models.transformer import TransformerDecoderBase, TransformerModelBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd_ext.modules.chunked_logits import LinearLogits

Projection = Callable[[Tensor], LinearLogits]

# of a module whose forward is not called
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NoProjectionError(ValueError):
    """The model's probabilities come about in another way, which the message names."""


def find_projection(model: Any) -> Projection:
    """The output projection of a model, as it is trained or loaded.

    Args:
        model: an encoder-decoder, maybe in a wrapper for distributed training

    Returns:
        a function from features, shape ``(n, d)``, which the model returns with ``features_only=True``, to the logits
        that it returns without, not computed yet

    Raises:
        NoProjectionError: where logits are not the product of features and a matrix, or their softmax is not the
            model's probabilities, or the matrix must not be used outside of the model's forward
    """
    model = _unwrap(model)
    _require(_has_argument(model.forward, "features_only"), f"the forward of {_name(model)} has no features_only")
    for function in ("get_normalized_probs", "get_normalized_probs_scriptable"):
        _require_inherited(model, function, BaseFairseqModel, TransformerModelBase)
    decoder = getattr(model, "decoder", None)
    _require(decoder is not None, f"{_name(model)} has no decoder")
    for function in ("forward", "output_layer"):
        _require_inherited(decoder, function, TransformerDecoderBase)
    for function in ("get_normalized_probs", "get_normalized_probs_scriptable"):
        _require_inherited(decoder, function, FairseqDecoder)
    _require(decoder.adaptive_softmax is None, "its output layer is an adaptive softmax")
    projection = decoder.output_projection
    for what, module in (("the model", model), ("its decoder", decoder)):
        _require(not module._forward_hooks, f"{what} has hooks")  # they would see features in place of logits
    _require(not any(getattr(projection, hooks, None) for hooks in _HOOKS), "its output projection has hooks")
    _require("forward" not in vars(projection), "its output projection has a forward of its own")
    if hasattr(projection, "linear_logits"):
        return projection.linear_logits
    _require(type(projection) is nn.Linear, f"its output projection is a {_name(projection)}")
    return lambda features: LinearLogits(features, projection.weight, projection.bias)


def _unwrap(model: Any) -> Any:
    while isinstance(
        model,
        (ModuleProxyWrapper, DistributedTimeoutWrapper, LegacyDistributedDataParallel, DistributedDataParallel),
    ):
        # It looks for unused parameters in the graph of what forward returns, and takes those that are used
        # later for unused: they would be marked ready twice.
        _require(
            not getattr(model, "find_unused_parameters", False),
            "--find-unused-parameters sees no use of a parameter outside of the model's forward",
        )
        model = model.module
    _require(isinstance(model, BaseFairseqModel), f"it is in a {_name(model)}, which may hold a part of the weights")
    return model


def _has_argument(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _require_inherited(thing: Any, function: str, *bases: type) -> None:
    own = getattr(type(thing), function, None)
    inherited = function not in vars(thing) and any(own is getattr(base, function) for base in bases)
    _require(inherited, f"{_name(thing)} has a {function} of its own")


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NoProjectionError(reason)


def _name(thing: Any) -> str:
    return type(thing).__name__

"""One layer's parameters at several depths (Dabre and Fujita, 2019: Recurrent Stacking of Layers)."""

from typing import Any, Callable, Dict, Optional, Tuple

from torch import Tensor, nn

MOST_LAYERS = 1_000  # of a side; whatever file asks for them, each is built before weights are compared


class RepeatedLayer(nn.Module):
    """A layer once more, at a greater depth: the parameters of the `first`, and adapters of its own.

    The first depth is the layer itself. Its parameters are not registered here, so that they exist once: in
    memory, for the optimizer, in ``state_dict`` and in what is counted.

    Args:
        first: the layer at the first depth
        forward: of the layer's class, before checkpointing and without the first depth's adapters
        adapters: what follows the layer at this depth
    """

    def __init__(self, first: nn.Module, forward: Callable[..., Any], adapters: Optional[nn.Module] = None) -> None:
        super().__init__()
        self._first = (first,)  # in a tuple, out of sight of nn.Module
        self._forward = forward
        self.adapters = adapters

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `x`, shape ``(T, B, d)``, to the same shape; the rest goes to the layer."""
        return self._adapt(self._forward(self._first[0], x, *args, **kwargs))

    def _adapt(self, x: Tensor) -> Tensor:
        return x if self.adapters is None else self.adapters(x)

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """Nothing of an old checkpoint is renamed for this depth: the first depth has the parameters."""


class RepeatedDecoderLayer(RepeatedLayer):
    """A decoder layer once more, with a key and value cache of its own.

    fairseq keys a cache by the attention module, which all depths share. This depth's caches are therefore kept
    apart, in a dictionary inside the dictionary that the decoder passes down.

    Args:
        depth: tells the depths of one decoder apart
    """

    def __init__(
        self,
        first: nn.Module,
        forward: Callable[..., Any],
        adapters: Optional[nn.Module] = None,
        *,
        depth: int,
    ) -> None:
        super().__init__(first, forward, adapters)
        self._cache_key = f"recurrent_stacking_depth_{depth}"

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> Tuple[Tensor, Optional[Tensor], Any]:
        """Apply the layer.

        Args:
            x: shape ``(T, B, d)``; the last position alone in step-by-step decoding
            encoder_out: shape ``(S, B, d_encoder)``
            encoder_padding_mask: shape ``(B, S)``, bool
            incremental_state: the decoder's caches, in step-by-step decoding

        Returns:
            the output, shape ``(T, B, d)``, attention weights, and the layer's own third result
        """
        if incremental_state is not None:
            incremental_state = incremental_state.setdefault(self._cache_key, {})
        x, attention, rest = self._forward(
            self._first[0], x, encoder_out, encoder_padding_mask, incremental_state, **kwargs
        )
        return self._adapt(x), attention, rest

    def reorder_incremental_state(self, incremental_state: Dict[str, Any], new_order: Tensor) -> None:
        """Reorder this depth's caches in place; `new_order`: shape ``(B,)``, int64."""
        cache = incremental_state.get(self._cache_key)
        if cache is None:
            return
        for module in self._first[0].modules():
            reorder: Any = getattr(module, "reorder_incremental_state", None)
            if reorder is not None:
                reorder(cache, new_order)

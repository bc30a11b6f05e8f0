"""Cross-attention of a model that is never trained and never asked where it looks."""

from fairseq.modules import MultiheadAttention
from torch import nn


class FusedCrossAttention(MultiheadAttention):
    """fairseq's, by torch's fused kernel, as fairseq has it in self-attention.

    fairseq 0.12.2 computes cross-attention by products of its own, and in eval mode averages the attention weights of
    every layer: for step-by-step decoding and for alignments, neither of which a full pass has a use for.
    """

    def forward(self, *args, **kwargs):
        """As fairseq's without incremental state; gives no attention weights."""
        plain = {"static_kv": False, "need_weights": False, "need_head_weights": False}
        return super().forward(*args, **{**kwargs, **plain})


def fuse_cross_attention(model: nn.Module) -> None:
    """Let a model, which must not decode step by step, use it; what it computes stays the same."""
    for module in model.modules():
        if type(module) is MultiheadAttention and module.encoder_decoder_attention:
            module.__class__ = FusedCrossAttention

"""The encoder's fused inference path, turned off."""

import functools

from fairseq.modules.transformer_layer import TransformerEncoderLayerBase


def apply() -> None:
    """Make every encoder layer take its ordinary forward (fairseq 0.12.2 with torch >= 1.13).

    From torch 1.13 on the fused kernel wants a mask type that fairseq does not pass, and generation and
    validation of a post-norm model with padding fail. The ordinary forward computes the same function.
    """
    original = TransformerEncoderLayerBase.__init__
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.can_use_fastpath = False

    init._kd_ext = True
    TransformerEncoderLayerBase.__init__ = init

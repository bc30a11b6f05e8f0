"""Upstream's encoder with recurrent stacking and adapters."""

from typing import List

from fairseq.models.transformer import TransformerEncoder, TransformerEncoderBase
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import nn

from kd_ext.models.build_depth import build_adapters, wrap_extended, wrap_plain
from kd_ext.models.extension_flags import SideSettings
from kd_ext.models.layers import AdaptedEncoderLayer, LeanEncoderLayer, name_dropout
from kd_ext.modules.recurrent_stack import RepeatedLayer


class TransformerExtEncoder(TransformerEncoderBase):
    """Upstream's encoder, its layers built as `settings` say.

    Args:
        settings: of this side; the number of depths is ``cfg.encoder.layers``
    """

    def __init__(self, cfg, dictionary, embed_tokens, settings: SideSettings):
        self._settings = settings
        self._built: List[nn.Module] = []  # by build_encoder_layer, which the base class calls
        super().__init__(cfg, dictionary, embed_tokens)
        del self._built
        name_dropout(self, TransformerEncoder.__name__)

    def build_encoder_layer(self, cfg):
        adapters = build_adapters(self._settings.adapters, cfg.encoder.embed_dim, cfg.dropout)
        if self._settings.depths and self._built:
            layer = RepeatedLayer(self._built[0], TransformerEncoderLayerBase.forward, adapters)
        elif adapters is not None:
            layer = AdaptedEncoderLayer(cfg, adapters)
        else:
            layer = LeanEncoderLayer(cfg, return_fc=self.return_fc)
        self._built.append(layer)
        extended = self._settings.depths or adapters is not None
        return wrap_extended(layer, cfg) if extended else wrap_plain(layer, cfg)

"""Upstream's decoder with recurrent stacking, adapters and a factorized output projection."""

from typing import List

from fairseq.models.transformer import TransformerDecoder, TransformerDecoderBase
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import nn

from kd_ext.models.build_depth import build_adapters, wrap_extended
from kd_ext.models.extension_flags import SideSettings
from kd_ext.models.layers import AdaptedDecoderLayer, name_dropout
from kd_ext.modules.factorized_embedding import FactorizedProjection, TiedFactorizedProjection
from kd_ext.modules.recurrent_stack import RepeatedDecoderLayer


class TransformerExtDecoder(TransformerDecoderBase):
    """Upstream's decoder, its layers and output projection built as `settings` say.

    Args:
        settings: of this side; the number of depths is ``cfg.decoder.layers``
    """

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn, settings: SideSettings):
        self._settings = settings
        self._built: List[nn.Module] = []  # by build_decoder_layer, which the base class calls
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn)
        del self._built
        name_dropout(self, TransformerDecoder.__name__)

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        adapters = build_adapters(self._settings.adapters, cfg.decoder.embed_dim, cfg.dropout)
        if not self._settings.depths and adapters is None:
            return super().build_decoder_layer(cfg, no_encoder_attn)
        if self._settings.depths and self._built:
            layer = RepeatedDecoderLayer(
                self._built[0], TransformerDecoderLayerBase.forward, adapters, depth=len(self._built)
            )
        elif adapters is not None:
            layer = AdaptedDecoderLayer(cfg, no_encoder_attn, adapters)
        else:
            layer = TransformerDecoderLayerBase(cfg, no_encoder_attn)
        self._built.append(layer)
        return wrap_extended(layer, cfg)

    def build_output_projection(self, cfg, dictionary, embed_tokens):
        super().build_output_projection(cfg, dictionary, embed_tokens)
        factor_dim = self._settings.factorized_dim
        if not factor_dim:
            return
        if self.share_input_output_embed:
            self.output_projection = TiedFactorizedProjection(embed_tokens)
        else:
            self.output_projection = FactorizedProjection(self.output_embed_dim, factor_dim, len(dictionary))

    def upgrade_state_dict_named(self, state_dict, name):
        key = f"{name}.output_projection.weight"
        was_there = key in state_dict
        state_dict = super().upgrade_state_dict_named(state_dict, name)
        if isinstance(self.output_projection, TiedFactorizedProjection) and not was_there:
            state_dict.pop(key, None)  # upstream has copied the embedding there, if there was one
        return state_dict

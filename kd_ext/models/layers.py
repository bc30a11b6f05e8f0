"""Upstream's layers without their dead parameters, and with adapters behind them."""

import re

from fairseq.modules import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import nn

# The copies of an encoder layer's weights that fairseq 0.12.2 keeps for its fused inference path. They are
# never trained, double the encoder's size and are unused parameters under DDP; git main no longer has them.
DEAD_PARAMETERS = tuple(
    f"{name}_{kind}" for name in ("in_proj", "out_proj", "fc1", "fc2") for kind in ("weight", "bias")
)


_DEAD_NAME = re.compile(rf"encoder\.layers\.\d+\.({'|'.join(DEAD_PARAMETERS)})$")


def is_dead(name: str) -> bool:
    """Whether a name in a checkpoint is one of those copies."""
    return _DEAD_NAME.match(name) is not None


def drop_dead_parameters(model: nn.Module) -> None:
    """Take those copies out of a model that is complete, and will not be saved."""
    for layer in model.modules():
        if isinstance(layer, TransformerEncoderLayerBase):
            _drop_from(layer)


def _drop_from(layer: TransformerEncoderLayerBase) -> None:
    for name in DEAD_PARAMETERS:
        if hasattr(layer, name):
            delattr(layer, name)


def name_dropout(module: nn.Module, name: str) -> None:
    """Have ``--retain-dropout-modules`` find a module's own dropout by the name of upstream's class."""
    for child in module.children():
        if isinstance(child, FairseqDropout):
            child.module_name = name


class LeanEncoderLayer(TransformerEncoderLayerBase):
    """Upstream's encoder layer without its eight dead parameters; checkpoints load with and without them."""

    def __init__(self, cfg, return_fc=False):
        super().__init__(cfg, return_fc=return_fc)
        name_dropout(self, TransformerEncoderLayerBase.__name__)
        _drop_from(self)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # not upstream's, which fills the dead parameters in
        for name in DEAD_PARAMETERS:
            state_dict.pop(prefix + name, None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


class AdaptedEncoderLayer(LeanEncoderLayer):
    def __init__(self, cfg, adapters):
        super().__init__(cfg)
        self.adapters = adapters

    def forward(self, x, encoder_padding_mask, attn_mask=None):
        """As upstream's; `x`: shape ``(S, B, d)``."""
        return self.adapters(super().forward(x, encoder_padding_mask, attn_mask))


class AdaptedDecoderLayer(TransformerDecoderLayerBase):
    def __init__(self, cfg, no_encoder_attn, adapters):
        super().__init__(cfg, no_encoder_attn)
        name_dropout(self, TransformerDecoderLayerBase.__name__)
        self.adapters = adapters

    def forward(self, x, *args, **kwargs):
        """As upstream's; `x`: shape ``(T, B, d)``."""
        x, attention, rest = super().forward(x, *args, **kwargs)
        return self.adapters(x), attention, rest

"""What the encoder and the decoder have in common when they build the layer of one depth."""

from typing import Optional

from fairseq.distributed import fsdp_wrap
from fairseq.modules import FairseqDropout
from fairseq.modules.checkpoint_activations import checkpoint_wrapper

from kd_ext.models.extension_flags import AdapterSettings
from kd_ext.modules.activation_checkpointing import checkpoint_activations
from kd_ext.modules.adapter import Adapter, AdapterSet


def build_adapters(settings: Optional[AdapterSettings], width: int, dropout: float) -> Optional[AdapterSet]:
    """The adapters of one depth; None where there are none."""
    if settings is None:
        return None
    bottleneck = width // settings.reduction_factor

    def build() -> Adapter:
        dropped = FairseqDropout(dropout, module_name=Adapter.__name__)  # which --retain-dropout finds
        return Adapter(width, bottleneck, settings.activation, dropped, settings.gated)

    return AdapterSet([(name, build()) for name in settings.ids], settings.active)


def wrap_plain(layer, cfg):
    """What upstream's ``build_*_layer`` wraps a layer in."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


def wrap_extended(layer, cfg):
    """The same for a layer with adapters or of several depths.

    Such a layer gets no FSDP unit of its own: a depth that uses the parameters of another's would find them
    sharded, and a unit cannot be frozen in part. The model as a whole is still wrapped.
    """
    return checkpoint_activations(layer) if cfg.checkpoint_activations else layer

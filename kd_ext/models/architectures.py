"""The named architectures: each of upstream's sizes with each extension switched on by default."""

from typing import Any

from fairseq.models import ARCH_CONFIG_REGISTRY, register_model_architecture

from kd_ext.models.transformer_ext import with_defaults

SIZES = (
    "",
    "_tiny",
    "_iwslt_de_en",
    "_wmt_en_de",
    "_vaswani_wmt_en_de_big",
    "_vaswani_wmt_en_fr_big",
    "_wmt_en_de_big",
    "_wmt_en_de_big_t2t",
)


def _adapter(args: Any) -> None:
    """Nothing changes until the adapter flags are given."""


def _recurrent_stacking(args: Any) -> None:
    """Both sides stacked as deep as they have layers."""
    args.encoder_recurrent_stacking = getattr(args, "encoder_recurrent_stacking", args.encoder_layers)
    args.decoder_recurrent_stacking = getattr(args, "decoder_recurrent_stacking", args.decoder_layers)


def _factorized_embedding(args: Any) -> None:
    """k = 128 on both sides; half the width where that is less (``_tiny``), since k must be less than it."""
    for side in ("encoder", "decoder"):
        name, width = f"{side}_factorized_embed_dim", getattr(args, f"{side}_embed_dim")
        setattr(args, name, getattr(args, name, min(128, width // 2)))


FAMILIES = {
    "transformer_adapter": _adapter,
    "transformer_recurrent_stacking": _recurrent_stacking,
    "transformer_factorized_embedding": _factorized_embedding,
}


def _register(family: str, size: str) -> None:
    upstream, extend = ARCH_CONFIG_REGISTRY[f"transformer{size}"], FAMILIES[family]

    def architecture(args: Any) -> None:
        upstream(args)
        extend(args)

    register_model_architecture("transformer_ext", family + size)(lambda args: with_defaults(args, architecture))


for _family in FAMILIES:
    for _size in SIZES:
        _register(_family, _size)

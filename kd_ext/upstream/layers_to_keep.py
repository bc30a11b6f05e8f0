"""``--encoder-layers-to-keep 0,2`` and the decoder's: to begin with some layers of a model, as LayerDrop's users do."""

from typing import Optional

from fairseq.models.transformer.transformer_config import EncDecBaseConfig


def apply() -> None:
    """Take the flags as text, which is what they are read as (fairseq 0.12.2).

    Their dataclass calls them lists of numbers, so that the command line makes one of ``0,2``; what builds the model
    and what prunes the weights split them at commas, and end with an AttributeError.
    """
    EncDecBaseConfig.__dataclass_fields__["layers_to_keep"].type = Optional[str]  # that of the decoder's, too
    EncDecBaseConfig.__annotations__["layers_to_keep"] = Optional[str]

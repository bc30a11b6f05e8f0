"""Those settings of a base that decide, beside its weights, what it computes: adapters belong to both."""

import argparse
import re
from argparse import Namespace
from typing import Any, Dict

from kd_ext.models.transformer_ext import TransformerExtModel, transformer_ext

# What is only for training or for building, or is seen in the weights (and in the adapters' number of depths). All
# else that the model class reads must agree: a setting that is missing here is refused too often, and never too rarely.
_NEUTRAL = re.compile(
    r".*dropout.*|.*layerdrop|.*_layers_to_keep|quant_noise_.*|.*_embed_path|checkpoint_activations|offload_activations"
    r"|min_params_to_wrap|load_checkpoint_liberally|.*adapter.*|(en|de)coder_layers|max_(source|target)_positions|base_.*"
)


def deciding(settings: Any) -> Dict[str, str]:
    """By name, as text, the settings of a base that its function depends on.

    Args:
        settings: a Namespace or a dictionary, of this project's architecture or upstream's transformer
    """
    values = settings if isinstance(settings, dict) else vars(settings)
    filled = Namespace(**{key: value for key, value in values.items() if value is not None})
    transformer_ext(filled)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    TransformerExtModel.add_args(parser)
    defaults = Namespace()
    transformer_ext(defaults)
    names = {action.dest for action in parser._actions} | set(vars(defaults))
    found = {name: getattr(filled, name, None) for name in names if not _NEUTRAL.fullmatch(name)}
    # a flag that was not given is False, or not there
    return without_implied({name: str(value) for name, value in sorted(found.items()) if value not in (None, False)})


def without_implied(settings: Dict[str, str]) -> Dict[str, str]:
    """Those that no other has with it: upstream's class notes in a checkpoint that the decoder's tables are one where
    all are, this project's does not."""
    implied = ["share_decoder_input_output_embed"] if settings.get("share_all_embeddings") == "True" else []
    return {name: value for name, value in settings.items() if name not in implied}

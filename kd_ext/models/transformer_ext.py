"""Upstream's transformer with recurrent stacking, adapters and factorized embeddings, each off by default."""

import logging
from argparse import Namespace
from typing import Any, Dict, Optional

from fairseq.checkpoint_utils import prune_state_dict
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel, base_architecture
from omegaconf import OmegaConf, open_dict

from kd_ext.errors import ConfigError
from kd_ext.models.decoder import TransformerExtDecoder
from kd_ext.models.encoder import TransformerExtEncoder
from kd_ext.models.extension_flags import (
    NO_ADAPTER,
    SIDES,
    ExtensionFlags,
    Extensions,
    read_extensions,
    set_defaults,
)
from kd_ext.models.layers import is_dead
from kd_ext.models.saved_settings import get
from kd_ext.modules.adapter import AdapterSet, adapter_of
from kd_ext.modules.factorized_embedding import FactorizedEmbedding
from kd_ext.modules.liberal_loading import match, summary

logger = logging.getLogger(__name__)


@register_model("transformer_ext")
class TransformerExtModel(TransformerModel):
    """Upstream's transformer (Vaswani et al., 2017) with the flags of :class:`ExtensionFlags`.

    With none of them it has upstream's parameter names and outputs, and checkpoints of either load in the other.
    With ``--*-train-adapter`` all but that adapter's parameters are frozen when the model is built.

    Raises:
        ConfigError: from ``build_model`` where a flag cannot be used, from ``load_state_dict`` where nothing fits
    """

    @classmethod
    def add_args(cls, parser):
        """Add upstream's flags and this project's to `parser`, without defaults: the architecture sets them."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, ExtensionFlags(), delete_default=True, with_prefix="")

    @classmethod
    def build_model(cls, args, task):
        transformer_ext(args)  # a checkpoint's settings may lack some
        # a copy: what is noted in it must not come into checkpoints
        settings = Namespace(**(OmegaConf.to_container(args) if OmegaConf.is_config(args) else vars(args)))
        extensions = read_extensions(settings)
        settings.extensions = extensions
        # upstream builds the encoder's embedding first, and the decoder's if it is another
        settings.factorized_dims = iter((extensions.encoder.factorized_dim, extensions.decoder.factorized_dim))
        for side in SIDES:
            depths, layers = getattr(extensions, side).depths, getattr(settings, f"{side}_layers")
            if depths and depths != layers:
                logger.info(
                    f"--{side}-recurrent-stacking {depths}: the {side} has {depths} depths; --{side}-layers {layers} "
                    "has no effect"
                )
                setattr(settings, f"{side}_layers", depths)
        model = super().build_model(settings, task)
        for side in SIDES:
            if getattr(settings, f"{side}_layers_to_keep"):  # as upstream: the pruned depth is what is saved
                setattr(args, f"{side}_layers", getattr(settings, f"{side}_layers"))
        # A flag of this run alone. What is built from a checkpoint later, to translate or to teach, loads strictly.
        args.load_checkpoint_liberally = False
        _choose_trained(model, extensions)
        return model

    @classmethod
    def build_embedding(cls, cfg, dictionary, embed_dim, path=None):
        factorized_dim = next(cfg.factorized_dims)
        if not factorized_dim:
            return super().build_embedding(cfg, dictionary, embed_dim, path)
        return FactorizedEmbedding(len(dictionary), factorized_dim, embed_dim, dictionary.pad())

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return TransformerExtEncoder(cfg, src_dict, embed_tokens, cfg.extensions.encoder)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return TransformerExtDecoder(cfg, tgt_dict, embed_tokens, cfg.no_cross_attention, cfg.extensions.decoder)

    def __init__(self, cfg, encoder, decoder):
        super().__init__(cfg, encoder, decoder)
        self._load_liberally: bool = cfg.extensions.load_liberally
        found = {side: getattr(cfg.extensions, side).adapters for side in SIDES}
        self._trained_ids: Dict[str, Optional[str]] = {side: x.trained if x else None for side, x in found.items()}
        del cfg.factorized_dims  # used up, and an iterator cannot be copied with the model

    def activate_adapter(self, encoder: Optional[str] = None, decoder: Optional[str] = None) -> None:
        """Use another adapter from now on, on each side; None or "none": no adapter there.

        Raises:
            ConfigError: for an id that a side does not have; nothing has changed then
        """
        chosen = []
        for side, asked in zip(SIDES, (encoder, decoder)):
            adapter_id = None if asked == NO_ADAPTER else asked
            sets = [module for module in getattr(self, side).modules() if isinstance(module, AdapterSet)]
            known = sets[0].ids if sets else []
            if adapter_id is not None and adapter_id not in known:
                raise ConfigError(
                    f"activate_adapter({side}={adapter_id!r}): unknown; the {side} has {', '.join(known) or 'none'}"
                )
            chosen += [(adapters, adapter_id) for adapters in sets]
        for adapters, adapter_id in chosen:
            adapters.active = adapter_id

    @property
    def frozen_by(self) -> Optional[str]:
        """The flag that froze all but an adapter; None if the base is trained."""
        return next((f"--{side}-train-adapter {name}" for side, name in self._trained_ids.items() if name), None)

    def check_resumed(self, path: str, settings: Any) -> None:
        """See that a checkpoint's run trained the adapters that this one trains: its optimizer's state is of those.

        Args:
            path: of the checkpoint that training is to go on from
            settings: its model's

        Raises:
            ConfigError: it trained others
        """
        for side, trained in self._trained_ids.items():
            before = get(settings, f"{side}_train_adapter")
            if before != trained:
                raise ConfigError(
                    f"--{side}-train-adapter {trained or 'is missing'}: {path} is of a run that trained "
                    f"{before or 'no adapter'}; give another --save-dir, or --reset-optimizer to begin anew"
                )

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        """As upstream's; under ``--load-checkpoint-liberally`` load what fits by name and shape.

        Raises:
            ConfigError: liberally, and nothing fits, or not all of what is frozen
        """
        if not self._load_liberally:
            return super().load_state_dict(state_dict, strict, model_cfg, args)
        state_dict = {name: tensor for name, tensor in state_dict.items() if not is_dead(name)}
        self.upgrade_state_dict(state_dict)
        state_dict = prune_state_dict(state_dict, model_cfg)
        found = match(self.state_dict(), state_dict)
        parameters = {name for name, _ in self.named_parameters()}
        if parameters.isdisjoint(found.fitting):
            raise ConfigError(
                "--load-checkpoint-liberally: no parameter of the checkpoint fits this model by name and shape; "
                "it is of another architecture or size"
            )
        logger.info("--load-checkpoint-liberally: %d tensors loaded", len(found.fitting))
        for what in ("missing", "unexpected", "misshapen"):
            names = getattr(found, what)
            logger.info("--load-checkpoint-liberally: %s: %s", what, ", ".join(names) or "none")
        frozen = [n for n, p in self.named_parameters() if not p.requires_grad and adapter_of(n) is None]
        lost = [name for name in frozen if name not in found.fitting]
        if lost:
            raise ConfigError(
                "--load-checkpoint-liberally: what is frozen would stay at its initial, random values: "
                f"{', '.join(summary(lost, parameters))}; give the flags of the size that the base has"
            )
        if frozen and found.unexpected:
            logger.warning(
                "--load-checkpoint-liberally: the checkpoint has what this model has no place for: %s",
                ", ".join(found.unexpected),
            )
        return super().load_state_dict(found.fitting, False, model_cfg, args)


@register_model_architecture("transformer_ext", "transformer_ext")
def transformer_ext(args: Any) -> None:
    """Upstream's ``transformer``, every extension off."""
    with_defaults(args, base_architecture)


def with_defaults(args: Any, architecture: Any) -> None:
    """Set the defaults of an `architecture`, then those of this project's flags, where `args` has no value.

    Args:
        args: a Namespace, or a DictConfig under Hydra, whose missing values read as None
        architecture: a function that sets defaults on a Namespace
    """
    is_config = OmegaConf.is_config(args)
    settings = Namespace(**{k: v for k, v in args.items() if v is not None}) if is_config else args
    architecture(settings)
    set_defaults(settings)
    # trainer and checkpoints read it from wherever the model's settings are, and a DictConfig says None
    settings.base_layers = getattr(settings, "base_layers", 0)
    if is_config:
        with open_dict(args):
            for name, value in vars(settings).items():
                args[name] = value


def _choose_trained(model: TransformerExtModel, extensions: Extensions) -> None:
    """Freeze what is not to be trained, before any optimizer sees it, and log what is left."""
    sides = [(side, getattr(extensions, side).adapters) for side in SIDES]
    adapters = [(side, found) for side, found in sides if found is not None]
    if not adapters:
        return
    trained = {(side, found.trained) for side, found in adapters if found.trained is not None}
    for name, parameter in model.named_parameters():
        owner = adapter_of(name)
        # without an id to train, adapters are unused and the base is trained
        parameter.requires_grad = owner in trained if trained else owner is None
    for side, found in adapters:
        logger.info(
            f"{side} adapters: {', '.join(found.ids)}; trained: {found.trained or 'none'}; "
            f"active: {found.active or 'none'}"
        )
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    logger.info(
        f"adapters: {sum(n for n, on in sizes if on):,} of {sum(n for n, _ in sizes):,} parameters are trainable"
    )

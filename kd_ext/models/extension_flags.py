"""The flags of ``transformer_ext``, and their values read and checked."""

import logging
from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, NamedTuple, Optional

from fairseq.dataclass import FairseqDataclass
from torch import nn

from kd_ext.errors import ConfigError
from kd_ext.modules.adapter import ACTIVATIONS
from kd_ext.modules.recurrent_stack import MOST_LAYERS

logger = logging.getLogger(__name__)

SIDES = ("encoder", "decoder")
NO_ADAPTER = "none"
# "none" is for --activate-*-adapter; the others are attributes that a set of adapters, a module, assigns to
_RESERVED_IDS = (NO_ADAPTER, "active", *vars(nn.Module()))
_WANTED = {int: "a whole number, without quotes", bool: "true or false, without quotes", str: "a name"}


@dataclass
class SideFlags(FairseqDataclass):
    """Flags that each side has: ``--encoder-add-adapters`` and so on."""

    recurrent_stacking: int = field(
        default=0,
        metadata={"help": "one layer, applied this many times with the same parameters; 0: a stack of layers"},
    )
    factorized_embed_dim: int = field(
        default=0,
        metadata={"help": "embeddings of V x this number, projected to the model's width; 0: not factorized"},
    )
    add_adapters: bool = field(default=False, metadata={"help": "an adapter for each id after each layer"})
    adapter_reduction_factor: int = field(
        default=2, metadata={"help": "the model's width divided by the adapters' bottleneck"}
    )
    adapter_ids: Optional[str] = field(
        default=None, metadata={"help": "names of the adapters, joined by commas: de,hi,ta"}
    )
    train_adapter: Optional[str] = field(
        default=None, metadata={"help": "id of the adapter to train; everything else is frozen"}
    )
    adapter_use_gating: bool = field(default=False, metadata={"help": "a gate for each token on what the adapters add"})


@dataclass
class ExtensionFlags(FairseqDataclass):
    encoder: SideFlags = field(default_factory=SideFlags)
    decoder: SideFlags = field(default_factory=SideFlags)
    adapter_activation_fn: str = field(default="relu", metadata={"help": "of the adapters: " + ", ".join(ACTIVATIONS)})
    load_checkpoint_liberally: bool = field(
        default=False,
        metadata={"help": "load what fits of a checkpoint by name and shape, and keep the initial values else"},
    )


class AdapterSettings(NamedTuple):
    """The adapters of one side; `trained` and `active` are ids, or None."""

    ids: List[str]
    reduction_factor: int
    activation: str
    gated: bool
    trained: Optional[str]
    active: Optional[str]


class SideSettings(NamedTuple):
    """What is on at one side; 0 and None: off."""

    depths: int
    factorized_dim: int
    adapters: Optional[AdapterSettings]


class Extensions(NamedTuple):
    encoder: SideSettings
    decoder: SideSettings
    load_liberally: bool


def activation_key(side: str) -> str:
    """The setting that picks a side's adapter at inference; it is an override, and no flag of training."""
    return f"activate_{side}_adapter"


def set_defaults(args: Any) -> None:
    """Give `args` every setting of this file that it lacks."""
    for side in SIDES:
        for flag in _flags(SideFlags):
            name = f"{side}_{flag.name}"
            setattr(args, name, getattr(args, name, flag.default))
        setattr(args, activation_key(side), getattr(args, activation_key(side), None))
    for flag in _flags(ExtensionFlags):
        if flag.name not in SIDES:
            setattr(args, flag.name, getattr(args, flag.name, flag.default))


def _flags(group):
    return [flag for flag in fields(group) if not flag.name.startswith("_")]


def read_extensions(args: Namespace) -> Extensions:
    """Read and check the settings of one model.

    Args:
        args: with every setting of upstream's transformer and of this file

    Raises:
        ConfigError: naming the flag, its value and what would work
    """
    _check_types(args)
    if args.adapter_activation_fn not in ACTIVATIONS:
        raise ConfigError(
            f"--adapter-activation-fn {args.adapter_activation_fn}: unknown; one of {', '.join(ACTIVATIONS)}"
        )
    encoder, decoder = (_read_side(args, side) for side in SIDES)
    _check_layers(args, {"encoder": encoder.depths, "decoder": decoder.depths})
    if args.adapter_activation_fn != "relu" and not (encoder.adapters or decoder.adapters):
        logger.warning("--adapter-activation-fn %s has no effect: there are no adapters", args.adapter_activation_fn)
    _check_embeddings(args, encoder.factorized_dim, decoder.factorized_dim)
    if args.offload_activations and any(side.depths or side.adapters for side in (encoder, decoder)):
        raise ConfigError(
            "--offload-activations: not with adapters or recurrent stacking; use --checkpoint-activations"
        )
    return Extensions(encoder, decoder, args.load_checkpoint_liberally)


def _check_types(args: Namespace) -> None:
    """A recipe's values, and those from Python, are of whatever type they were written in."""
    flags = {flag.name: flag for flag in _flags(ExtensionFlags) if flag.name not in SIDES}
    flags.update({f"{side}_{flag.name}": flag for side in SIDES for flag in _flags(SideFlags)})
    for name, flag in flags.items():
        value = getattr(args, name)
        is_right = value in (True, False, None) if flag.type is bool else type(value) is flag.type
        if flag.type in _WANTED and not is_right:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value!r}: is a {type(value).__name__}; give {_WANTED[flag.type]}"
            )


def _read_side(args: Namespace, side: str) -> SideSettings:
    def value(name):
        return getattr(args, f"{side}_{name}")

    depths, factorized_dim, width = value("recurrent_stacking"), value("factorized_embed_dim"), value("embed_dim")
    if depths < 0:
        raise ConfigError(f"--{side}-recurrent-stacking {depths}: negative; a number of depths, or 0 for off")
    if depths > MOST_LAYERS:  # no checkpoint of it could be read
        raise ConfigError(f"--{side}-recurrent-stacking {depths}: out of range; at most {MOST_LAYERS} depths")
    if factorized_dim and not 0 < factorized_dim < width:
        raise ConfigError(
            f"--{side}-factorized-embed-dim {factorized_dim}: must be over 0 and less than --{side}-embed-dim "
            f"{width}; 0 turns it off"
        )
    if factorized_dim and value("embed_path"):
        raise ConfigError(
            f"--{side}-embed-path {value('embed_path')}: whole embeddings cannot be loaded with "
            f"--{side}-factorized-embed-dim {factorized_dim}; leave one of the two out"
        )
    return SideSettings(depths, factorized_dim, _read_adapters(args, side, width))


def _check_layers(args: Namespace, depths: Dict[str, int]) -> None:
    """What of upstream does not go with depths that are one layer."""
    for side in filter(depths.get, SIDES):
        stacking = f"--{side}-recurrent-stacking {depths[side]}"
        for pruned in SIDES:  # naming one side's layers drops the other's, unless they are named as well
            kept = getattr(args, f"{pruned}_layers_to_keep")
            if kept:
                remedy = "give the number of depths to keep by that flag" if pruned == side else "leave one of them out"
                raise ConfigError(
                    f"--{pruned}-layers-to-keep {kept}: not with {stacking}, whose depths are one layer; {remedy}"
                )
        if args.quant_noise_pq:
            raise ConfigError(
                f"--quant-noise-pq {args.quant_noise_pq}: not with {stacking}: noise would be put on noise, once for "
                "each depth; leave one of the two out"
            )


def _read_adapters(args: Namespace, side: str, width: int) -> Optional[AdapterSettings]:
    def value(name):
        return getattr(args, f"{side}_{name}")

    ids, factor, trained = value("adapter_ids"), value("adapter_reduction_factor"), value("train_adapter")
    asked = getattr(args, activation_key(side))
    for flag, given in ((f"--{side}-adapter-ids", ids), (f"--{side}-train-adapter", trained)):
        if given is not None and not isinstance(given, str):
            raise ConfigError(f"{flag} {given}: not a name but a {type(given).__name__}: quote what you wrote, as 'no'")
    if not value("add_adapters"):
        for flag, given in (
            (f"--{side}-adapter-ids", ids),
            (f"--{side}-train-adapter", trained),
            (f"--{side}-adapter-use-gating", value("adapter_use_gating") or None),
        ):
            if given is not None:
                raise ConfigError(f"{_shown(flag, given)}: the {side} has no adapters; add --{side}-add-adapters")
        if factor != 2:
            logger.warning("--%s-adapter-reduction-factor %s has no effect: the %s has no adapters", side, factor, side)
        if asked not in (None, NO_ADAPTER):
            raise ConfigError(
                f"--activate-{side}-adapter {asked}: the {side} of this checkpoint has no adapters; use "
                f"'{NO_ADAPTER}', or a checkpoint that was trained with --{side}-add-adapters"
            )
        return None
    if not ids:
        raise ConfigError(f"--{side}-adapter-ids is missing: --{side}-add-adapters needs names, as in de,hi,ta")
    known = ids.split(",")
    for name in known:
        if known.count(name) > 1:
            raise ConfigError(f"--{side}-adapter-ids {ids}: '{name}' is there twice; name each id once")
        if not is_id(name):
            raise ConfigError(
                f"--{side}-adapter-ids {ids}: '{name}' cannot be an id; names joined by commas, without dots, colons, "
                f"spaces, $ or braces, as in de,hi,ta ('{NO_ADAPTER}', 'active' and 'training' are taken)"
            )
    if not 1 <= factor <= width:
        raise ConfigError(f"--{side}-adapter-reduction-factor {factor}: must be from 1 to --{side}-embed-dim {width}")
    for flag, name in ((f"--{side}-train-adapter", trained), (f"--activate-{side}-adapter", asked)):
        if name is not None and name not in known and not (name == NO_ADAPTER and name is asked):
            raise ConfigError(f"{flag} {name}: unknown; the {side} has {', '.join(known)}")
    active = trained if asked is None else (None if asked == NO_ADAPTER else asked)
    return AdapterSettings(known, factor, args.adapter_activation_fn, value("adapter_use_gating"), trained, active)


def is_id(name: str) -> bool:
    """Whether an adapter can be called so: in names of parameters, in lists, and on a line."""
    return name not in ("", *_RESERVED_IDS) and not set(". :${},") & set(name) and name.isprintable()


def _shown(flag: str, given: Any) -> str:
    return flag if given is True else f"{flag} {given}"


def _check_embeddings(args: Namespace, encoder_dim: int, decoder_dim: int) -> None:
    """What upstream's ties and output layers ask of factorized embeddings."""
    if args.share_all_embeddings:
        for flag, encoder, decoder in (
            ("embed-dim", args.encoder_embed_dim, args.decoder_embed_dim),
            ("factorized-embed-dim", encoder_dim, decoder_dim),
        ):
            if encoder != decoder:
                raise ConfigError(
                    f"--share-all-embeddings: --encoder-{flag} {encoder} and --decoder-{flag} {decoder} must be equal"
                )
    if (encoder_dim or decoder_dim) and args.adaptive_softmax_cutoff is not None:
        raise ConfigError(
            f"--adaptive-softmax-cutoff {args.adaptive_softmax_cutoff}: not with factorized embeddings; leave it out"
        )
    tied = args.share_decoder_input_output_embed or args.share_all_embeddings
    if decoder_dim and tied and args.decoder_output_dim != args.decoder_embed_dim:
        raise ConfigError(
            f"--decoder-output-dim {args.decoder_output_dim}: tied factorized embeddings need it to be "
            f"--decoder-embed-dim {args.decoder_embed_dim}"
        )

"""``--activate-encoder-adapter`` and ``--activate-decoder-adapter`` for generation and validation."""

import functools
import logging

from fairseq import checkpoint_utils, options
from fairseq.dataclass.configs import CommonEvalConfig
from fairseq.models import FairseqEncoderDecoderModel

from kd_ext.errors import ConfigError
from kd_ext.overrides import parse_overrides
from kd_ext.upstream.added_flags import fold_into_overrides

logger = logging.getLogger(__name__)


def apply() -> None:
    """Add the two options to the commands that use a model, whatever their task (fairseq 0.12.2).

    An option that is in no dataclass is dropped when the options become a configuration, so both are folded into
    ``--model-overrides``, which reaches the settings that the model is built from.
    """
    if getattr(options.gen_parser_from_dataclass, "_kd_ext", False):
        return
    _add_options()
    _fold_options()
    _prepare_loaded_models()


def _settings():
    # not at the top: models register themselves when they are imported, after every touch is in place
    from kd_ext.models.extension_flags import NO_ADAPTER, SIDES, activation_key

    return {activation_key(side): side for side in SIDES}, NO_ADAPTER


def _add_options() -> None:
    original = options.gen_parser_from_dataclass

    @functools.wraps(original)
    def gen_parser_from_dataclass(parser, dataclass_instance, *args, **kwargs):
        original(parser, dataclass_instance, *args, **kwargs)
        if isinstance(dataclass_instance, CommonEvalConfig):
            if parser.get_default("task") is None:
                # fairseq-validate has no default, and ends with "KeyError: None"; the checkpoint's task is what it uses
                parser.set_defaults(task="translation")
            sides, no_adapter = _settings()
            for key, side in sides.items():
                parser.add_argument(
                    "--" + key.replace("_", "-"),
                    metavar="ID",
                    help=f"the {side}'s adapter to use; '{no_adapter}': no adapter; default: the one that was trained",
                )

    gen_parser_from_dataclass._kd_ext = True
    options.gen_parser_from_dataclass = gen_parser_from_dataclass


def _fold_options() -> None:
    original = options.parse_args_and_arch

    @functools.wraps(original)
    def parse_args_and_arch(*args, **kwargs):
        parsed = original(*args, **kwargs)
        _fold(parsed[0] if isinstance(parsed, tuple) else parsed)
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


def _fold(args) -> None:
    if getattr(args, "model_overrides", None) is not None:
        parse_overrides("--model-overrides", args.model_overrides)  # else a traceback, or taken for damage of the file
    asked = {key: getattr(args, key) for key in _settings()[0] if getattr(args, key, None) is not None}
    if asked:
        fold_into_overrides(args, asked)


def _prepare_loaded_models() -> None:
    original = checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(original)
    def load_model_ensemble_and_task(filenames, arg_overrides=None, *args, **kwargs):
        loaded = original(filenames, arg_overrides, *args, **kwargs)
        for path, model in zip(filenames, loaded[0]):
            _prepare(path, model, arg_overrides or {})
        return loaded

    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task


def _prepare(path, model, overrides) -> None:
    """Thaw a model of ours; refuse one of another class, which would ignore the options.

    For a weight that needs no gradient torch takes another kernel in places: what training froze would change the
    last bit of scores, and with no adapter active they would not be those of the base.
    """
    from kd_ext.models.transformer_ext import TransformerExtModel

    if isinstance(model, TransformerExtModel):
        model.requires_grad_(True)
        for key, side in _settings()[0].items():
            _warn_of_untrained(path, getattr(model, side), f"--{key.replace('_', '-')}", overrides.get(key))
    elif isinstance(model, FairseqEncoderDecoderModel):  # not a language model that is fused in
        sides, no_adapter = _settings()
        for key in sides:
            if overrides.get(key) not in (None, no_adapter):
                raise ConfigError(
                    f"--{key.replace('_', '-')} {overrides[key]}: {path} is a {type(model).__name__}, which has no "
                    f"adapters; use '{no_adapter}', or a checkpoint of a transformer_adapter architecture"
                )


def _warn_of_untrained(path, stack, flag, adapter_id) -> None:
    """An adapter begins with zeros behind its bottleneck, by which it adds nothing."""
    behind = [x for name, x in stack.named_parameters() if f".adapters.{adapter_id}.up." in name]
    if behind and not any(bool(x.any()) for x in behind):
        logger.warning("%s %s: in %s it is as it began, and adds nothing", flag, adapter_id, path)

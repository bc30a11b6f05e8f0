"""``--bf16`` and ``--memory-efficient-bf16`` for GPUs and CPUs, and for the commands that use a model."""

import functools

import torch
from fairseq import checkpoint_utils, options

from kd_ext.upstream.added_flags import fold_into_overrides


def apply() -> None:
    """Take bfloat16 for a precision, not for a device (fairseq 0.12.2).

    On the command line ``--bf16`` switches ``--tpu`` on, and training ends where torch_xla is missing; in a recipe of
    Hydra it does not. Generation and validation do not know the flag: it reaches the models that they load by
    ``--model-overrides``, as the choice of an adapter does.
    """
    original = options.parse_args_and_arch
    if getattr(original, "_kd_ext_bf16", False):
        return

    @functools.wraps(original)
    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        parsed = original(parser, input_args, *args, **kwargs)
        settings = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(settings, "bf16", False):
            asked, _ = parser.parse_known_args(input_args)  # before --bf16 had an effect
            settings.tpu = bool(getattr(asked, "tpu", False))
            if hasattr(settings, "model_overrides"):
                fold_into_overrides(settings, {"bf16": True})
        return parsed

    parse_args_and_arch._kd_ext_bf16 = True
    options.parse_args_and_arch = parse_args_and_arch
    _convert_loaded_models()


def _convert_loaded_models() -> None:
    original = checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(original)
    def load_model_ensemble_and_task(filenames, arg_overrides=None, *args, **kwargs):
        loaded = original(filenames, arg_overrides, *args, **kwargs)
        # validation hands on the flags as they are given, before the second has become the first
        if any((arg_overrides or {}).get(name) is True for name in ("bf16", "memory_efficient_bf16")):
            for model in loaded[0]:
                model.to(torch.bfloat16)
        return loaded

    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task

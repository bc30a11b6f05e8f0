"""``--eval-bleu``: how validation is to translate and score is looked at before training."""

import functools
import json
from typing import Any, Dict, Optional

from fairseq.data import data_utils
from fairseq.data.encoders import TOKENIZER_REGISTRY
from fairseq.dataclass.configs import GenerationConfig
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation import TranslationTask

from kd_ext.errors import ConfigError
from kd_ext.upstream.command_line import near

_LENGTHS = ("max_len_b", "min_len")  # which fairseq rounds, or compares


def apply() -> None:
    """Look at the flags where the model is built (fairseq 0.12.2).

    Of a setting of another type, or of an unknown BPE, fairseq ends with a traceback at the first validation, an epoch
    later and before a checkpoint is written; one of an unknown name it passes over.
    """
    original = TranslationTask.build_model
    if getattr(original, "_kd_ext_looks", False):
        return

    @functools.wraps(original)
    def build_model(self, cfg, from_checkpoint=False):
        if self.cfg.eval_bleu and not from_checkpoint:  # of which nothing can be mended any more
            reads_more = type(self).build_generator is not FairseqTask.build_generator
            _check(self.cfg, reads_more)
        return original(self, cfg, from_checkpoint)

    build_model._kd_ext_looks = True
    TranslationTask.build_model = build_model


def _check(cfg: Any, reads_more: bool) -> None:
    """Where a task `reads_more` settings than fairseq's, other names are its own."""
    for name, value in _json("--eval-bleu-args", cfg.eval_bleu_args, '{"beam": 4}').items():
        if name in GenerationConfig.__dataclass_fields__ or not reads_more:
            _check_setting(name, value)
    _json("--eval-bleu-detok-args", cfg.eval_bleu_detok_args, '{"source_lang": "de"}')
    if cfg.eval_bleu_detok not in TOKENIZER_REGISTRY:
        known = ", ".join(sorted(TOKENIZER_REGISTRY))
        raise ConfigError(f"--eval-bleu-detok {cfg.eval_bleu_detok}: no tokenizer of fairseq's; one of {known}")
    symbol = cfg.eval_bleu_remove_bpe
    if not is_post_process(symbol):
        raise ConfigError(f"--eval-bleu-remove-bpe {symbol}: unknown to fairseq; such as sentencepiece, or subword_nmt")


def is_post_process(symbol: Optional[str]) -> bool:
    """Whether fairseq can undo the segmentation of that name; None: there is none."""
    try:
        data_utils.post_process("", symbol)
    except NotImplementedError:
        return False
    return True


def _check_setting(name: str, value: Any) -> None:
    fields = GenerationConfig.__dataclass_fields__
    given = f"--eval-bleu-args {json.dumps({name: value})}"
    if name not in fields:
        raise ConfigError(f"{given}: no setting of fairseq-generate's{near(name, list(fields)) or '; leave it out'}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        bool: value in (True, False),
        int: is_number and (not isinstance(value, float) or name in _LENGTHS),
        float: is_number,
    }
    if not fits.get(fields[name].type, True):
        raise ConfigError(f"{given}: of another type; {json.dumps({name: fields[name].default})} is its default")


def _json(flag: str, text: Optional[str], example: str) -> Dict[str, Any]:
    """The settings that a flag has as JSON, whose quotes are others than those of ``--model-overrides`` may be."""
    try:
        settings = json.loads(text or "")
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{flag} {text}: not JSON by names; write it as '{example}'")
    return settings

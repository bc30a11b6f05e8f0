"""What a translation task's own settings and data can have wrong that upstream does not look at, or late."""

import itertools
import json
import os

from fairseq import utils
from fairseq.tasks.translation import TranslationTask

from kd_ext.errors import ConfigError
from kd_ext.files.dictionaries import load_dictionary


def check_eval_bleu_args(text: str) -> None:
    """See that they are JSON, whose quotes are others than those of ``--teacher-model-overrides`` may be.

    Raises:
        ConfigError: they are not
    """
    try:
        settings = json.loads(text or "{}")
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"--eval-bleu-args {text}: not JSON by names; write it as '{{\"beam\": 4}}'")


def check_parts(task: TranslationTask) -> None:
    """See that all parts of the data have the dictionaries of the first, by which fairseq reads them all.

    Raises:
        ConfigError: one has others
    """
    first, *others = utils.split_paths(task.cfg.data)
    sides = (
        ("source", "--srcdict", task.cfg.source_lang, task.src_dict),
        ("target", "--tgtdict", task.cfg.target_lang, task.tgt_dict),
    )
    for part, (side, flag, language, words) in itertools.product(others, sides):
        path = os.path.join(part, f"dict.{language}.txt")
        if os.path.isfile(path) and load_dictionary(path).symbols != words.symbols:
            raise ConfigError(
                f"{part}: its {side} dictionary is not that of {first}; preprocess it with that one "
                f"(fairseq-preprocess {flag})"
            )

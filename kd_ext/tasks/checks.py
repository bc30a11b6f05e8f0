"""What a translation task's own settings, data and model can have wrong that upstream does not look at, or late."""

import inspect
import itertools
import os
from typing import Optional

from fairseq import utils
from fairseq.models import BaseFairseqModel, FairseqEncoderModel, FairseqLanguageModel
from fairseq.tasks.translation import TranslationTask

from kd_ext.errors import ConfigError
from kd_ext.files.dictionaries import load_dictionary


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


def check_student(model: BaseFairseqModel, architecture: Optional[str]) -> None:
    """See that a model takes what it is given in training: source, lengths, and of each word the ones before it.

    Raises:
        ConfigError: it is of another kind: predicts all words at once, say, or is a language model
    """
    try:
        inspect.signature(model.forward).bind(src_tokens=None, src_lengths=None, prev_output_tokens=None)
        fits = not isinstance(model, (FairseqEncoderModel, FairseqLanguageModel))
    except TypeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"--arch {architecture}: a {type(model).__name__} does not predict a translation word by word, as is "
            "distilled here; give an autoregressive encoder-decoder, such as transformer_ext"
        )

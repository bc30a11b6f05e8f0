"""A folder of Hugging Face transformers as something that translates and scores sentences: words in, words out."""

import contextlib
import os
import sys
from typing import Any, Iterator, List, Sequence

import torch
from fairseq.data import Dictionary, data_utils

from kd_ext.errors import ConfigError, in_short
from kd_ext.exporting.brought_json import CONFIG, read_config
from kd_ext.exporting.huggingface_format import OTHERS, POST_NORM, PRE_NORM, dictionary_names
from kd_ext.exporting.translators import Tokens, batches
from kd_ext.files.dictionaries import load_dictionary

INSTALL = "pip install transformers"


def require_transformers() -> Any:
    """The module, its classes loaded.

    Raises:
        ConfigError: it is not installed, or does without this torch, with how to install it
    """
    try:
        with _without_a_broken_torchaudio():
            import transformers

            for name in (POST_NORM, PRE_NORM):  # what it lacks shows only when a class is asked for
                getattr(transformers, name).from_pretrained  # noqa: B018
    except Exception as error:  # each release has its own way to say that it cannot be used here
        said = in_short(error)
        raise ConfigError(
            f"transformers is not installed, or does not go with this torch ({said}); {INSTALL}"
        ) from error
    return transformers


@contextlib.contextmanager
def _without_a_broken_torchaudio() -> Iterator[None]:
    """Import as if there were no torchaudio, where it is for another torch.

    fairseq requires it, so pip often brings one that the torch at hand cannot load, which fairseq never notices.
    transformers 5 imports it with any model, if it is installed.
    """
    try:
        import torchaudio  # noqa: F401
    except Exception:
        kept = sys.modules.get("torchaudio")
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules["torchaudio"]
            if kept is not None:
                sys.modules["torchaudio"] = kept
    else:
        yield


class HuggingFaceTranslator:
    """A model in a folder that ``--format huggingface`` wrote.

    Raises:
        ConfigError: there is no transformers, or it cannot read the folder
    """

    def __init__(self, folder: str) -> None:
        transformers = require_transformers()
        config = read_config(folder)
        names = dictionary_names(config)
        if not names:
            raise ConfigError(
                f'{os.path.join(folder, CONFIG)}: "langs" {config.get("langs")}: not two languages; name a folder that '
                "--format huggingface wrote"
            )
        self._source, self._target = (load_dictionary(os.path.join(folder, name)) for name in names)
        try:
            self._model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
            # as the library has them, which knows what a file does not say
            self.longest = int(self._model.config.max_position_embeddings)
            self.longest_translation = self._model.generation_config.max_length - OTHERS
        except Exception as error:  # whatever it has against files that are not what was written
            said = in_short(error)
            raise ConfigError(f"{folder}: transformers {transformers.__version__} cannot read it ({said})") from error
        self.vocabularies = (self._source.symbols, self._target.symbols)

    @torch.no_grad()
    def translate(self, sentences: Sequence[Tokens], longest: int) -> List[Tokens]:
        """The best of a beam, with the folder's own settings, of so many words at most; it may say nothing, as the
        others may."""
        length = {"min_new_tokens": 0, "max_length": longest + OTHERS}
        found: List[Tokens] = []
        special = (self._target.bos(), self._target.pad(), self._target.eos())
        for batch in batches(sentences):
            ids = self._model.generate(**self._source_batch(batch), **length)
            found += [[self._target[i] for i in row if i not in special] for row in ids.tolist()]
        return found

    @torch.no_grad()
    def score(self, sentences: Sequence[Tokens], translations: Sequence[Tokens]) -> List[List[float]]:
        """Log-probabilities of each word of translations, and of their ends."""
        found: List[List[float]] = []
        for batch, targets in zip(batches(sentences), batches(translations)):
            ids = [_ids(self._target, words) for words in targets]
            pad, eos = self._target.pad(), self._target.eos()
            previous = data_utils.collate_tokens(ids, pad, eos, move_eos_to_beginning=True)
            gold = data_utils.collate_tokens(ids, pad, eos)
            # with a cache FSMT takes what it is given for one more word, and masks nothing
            output = self._model(**self._source_batch(batch), decoder_input_ids=previous, use_cache=False)
            scores = output.logits.log_softmax(2).gather(2, gold.unsqueeze(2)).squeeze(2)
            found += [row[: len(x)].tolist() for row, x in zip(scores, ids)]
        return found

    def _source_batch(self, sentences: Sequence[Tokens]) -> Any:
        ids = [_ids(self._source, words) for words in sentences]
        tokens = data_utils.collate_tokens(ids, self._source.pad())
        return {"input_ids": tokens, "attention_mask": tokens.ne(self._source.pad()).long()}


def _ids(words: Dictionary, sentence: Tokens) -> torch.Tensor:
    return torch.tensor([*map(words.index, sentence), words.eos()])

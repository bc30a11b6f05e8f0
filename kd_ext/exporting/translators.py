"""A model that translates and scores sentences, in fairseq or in CTranslate2: words in, words out."""

import os
from typing import Any, List, Sequence

import torch
from fairseq.data import data_utils
from fairseq.sequence_generator import SequenceGenerator
from torch import nn

from kd_ext.errors import ConfigError, in_short
from kd_ext.exporting.brought_json import read_json

Tokens = List[str]

BEAM, BATCH = 5, 32
LONGEST = 200  # words of a translation: fairseq's default, where CTranslate2's is 256; a model may have fewer positions
# Both may say nothing: to forbid it CTranslate2 takes the end out before the softmax and fairseq after it, by which
# their scores differ.
_SHORTEST = 0
_PADDING = "<blank>"  # as CTranslate2 calls it
INSTALL = "pip install 'fairseq-kd-ext[export]', or pip install ctranslate2"


def longest_translation(model: nn.Module) -> int:
    """Of how many words a model's translation is at most; its end takes a position, too."""
    return min(LONGEST, model.max_positions()[1] - 1)


class FairseqTranslator:
    """A model of fairseq.

    Args:
        model: in evaluation mode, on the CPU
        task: has its dictionaries
    """

    def __init__(self, model: nn.Module, task: Any) -> None:
        self._model = model
        self._source, self._target = task.source_dictionary, task.target_dictionary
        self.vocabularies = (self._source.symbols, self._target.symbols)
        self._left_pad = task.cfg.left_pad_source
        self.longest, self.longest_translation = model.max_positions()[0], longest_translation(model)

    @torch.no_grad()
    def translate(self, sentences: Sequence[Tokens], longest: int) -> List[Tokens]:
        """The best of a beam of five, as ``fairseq-generate`` has it, of so many words at most."""
        generator = SequenceGenerator([self._model], self._target, beam_size=BEAM, max_len_b=longest, min_len=_SHORTEST)
        found: List[Tokens] = []
        for batch in batches(sentences):
            hypotheses = generator.generate([self._model], {"net_input": self._source_batch(batch)})
            for best, *_ in hypotheses:
                found.append([self._target[i] for i in best["tokens"].tolist() if i != self._target.eos()])
        return found

    @torch.no_grad()
    def score(self, sentences: Sequence[Tokens], translations: Sequence[Tokens]) -> List[List[float]]:
        """Log-probabilities of each word of translations, and of their ends."""
        found: List[List[float]] = []
        for batch, targets in zip(batches(sentences), batches(translations)):
            ids = [self._ids(self._target, words) for words in targets]
            pad, eos = self._target.pad(), self._target.eos()
            previous = data_utils.collate_tokens(ids, pad, eos, move_eos_to_beginning=True)
            gold = data_utils.collate_tokens(ids, pad, eos)
            output = self._model(**self._source_batch(batch), prev_output_tokens=previous)
            scores = self._model.get_normalized_probs(output, log_probs=True).gather(2, gold.unsqueeze(2)).squeeze(2)
            found += [row[: len(x)].tolist() for row, x in zip(scores, ids)]
        return found

    def _source_batch(self, sentences: Sequence[Tokens]) -> Any:
        ids = [self._ids(self._source, words) for words in sentences]
        tokens = data_utils.collate_tokens(ids, self._source.pad(), left_pad=self._left_pad)
        return {"src_tokens": tokens, "src_lengths": torch.tensor([len(x) for x in ids])}

    @staticmethod
    def _ids(words: Any, sentence: Tokens) -> torch.Tensor:
        return torch.tensor([*map(words.index, sentence), words.eos()])


class CTranslate2Translator:
    """A model in a folder that CTranslate2 reads, in the precision of its weights.

    Raises:
        ConfigError: there is no CTranslate2, or it cannot read the folder
    """

    longest = 1024  # of a source, beyond which CTranslate2 cuts off
    longest_translation = LONGEST  # its files do not say how many positions there are

    def __init__(self, folder: str) -> None:
        try:
            self._translator = require_ctranslate2().Translator(folder, intra_threads=torch.get_num_threads())
        except RuntimeError as error:
            raise ConfigError(f"{folder}: CTranslate2 cannot read it ({in_short(error)})") from error
        self._folder = folder
        words = [_vocabulary(folder, side) for side in ("source", "target")]
        # fairseq never says it, but has it in its softmax; CTranslate2 takes no word here that the model does not have
        self._never = [[_PADDING]] if _PADDING in words[1] else None
        self.vocabularies = tuple(["<pad>" if word == _PADDING else word for word in side] for side in words)

    def translate(self, sentences: Sequence[Tokens], longest: int) -> List[Tokens]:
        """The best of a beam of five, of so many words at most.

        Raises:
            ConfigError: CTranslate2 cannot, as where the model has fewer positions
        """
        try:
            results = self._translator.translate_batch(
                list(sentences),
                beam_size=BEAM,
                max_batch_size=BATCH,
                max_decoding_length=longest,
                min_decoding_length=_SHORTEST,
                suppress_sequences=self._never,
            )
        except RuntimeError as error:
            said = in_short(error)
            raise ConfigError(
                f"{self._folder}: CTranslate2 cannot translate with up to {longest} words ({said}); compare it with "
                "its checkpoint, which says how long translations can be"
            ) from error
        return [result.hypotheses[0] for result in results]

    def score(self, sentences: Sequence[Tokens], translations: Sequence[Tokens]) -> List[List[float]]:
        """Log-probabilities of each word of translations, and of their ends."""
        results = self._translator.score_batch(list(sentences), list(translations), max_batch_size=BATCH)
        return [list(result.log_probs) for result in results]


def require_ctranslate2() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed, with how to install it
    """
    try:
        import ctranslate2
    except ImportError as error:
        raise ConfigError(f"--format ctranslate2: CTranslate2 is not installed ({error}); {INSTALL}") from error
    return ctranslate2


def is_ctranslate2(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "model.bin"))


def _vocabulary(folder: str, side: str) -> List[str]:
    """A side's words, of the file that CTranslate2 reads of those in a folder that it could load."""
    for name in ("shared_vocabulary", f"{side}_vocabulary"):
        path = os.path.join(folder, name)
        if os.path.isfile(f"{path}.json"):
            return read_json(f"{path}.json")
        if os.path.isfile(f"{path}.txt"):  # of older releases
            with open(f"{path}.txt", encoding="utf-8", errors="replace", newline="\n") as file:
                return [line.rstrip("\r\n") for line in file]
    raise ConfigError(f"{folder}: no one {side} vocabulary in it; name the folder of a model with one for each side")


def batches(sentences: Sequence[Tokens]) -> List[Sequence[Tokens]]:
    """Sentences by as many as are translated at once."""
    return [sentences[i : i + BATCH] for i in range(0, len(sentences), BATCH)]

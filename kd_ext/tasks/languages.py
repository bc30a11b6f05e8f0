"""The languages of a training set, and of a sentence: ``--kd-language-tag``, ``--kd-language-tags`` and ``-side``."""

import difflib
import itertools
import logging
import os
from typing import Any, Dict, Iterator, List, NamedTuple, Set

import numpy as np
import torch
from fairseq import utils
from fairseq.data import Dictionary
from torch import Tensor
from tqdm import tqdm

from kd_ext.errors import ConfigError
from kd_ext.files.reading import require_regular
from kd_ext.modules.language_tags import LanguageTags
from kd_ext.modules.tag_places import MOST_CANDIDATES, Sentences, TagPlaces
from kd_ext.parsing import check_path
from kd_ext.tasks.word_numbers import check_words
from kd_ext.upstream.flat_tokens import sentences_of

logger = logging.getLogger(__name__)

PREFIX_FLAG, LIST_FLAG, SIDE_FLAG = "--kd-language-tag", "--kd-language-tags", "--kd-language-side"
DEFAULT_PREFIX = "__src__"
SIDES = ("source", "target")
# sentencepiece's beginning of a word: of a tag that it was told of it makes two pieces, this and the tag
BOUNDARY = "\u2581"
# A language has next to none of the sentences if it has fewer than so many, or than this part of an even share.
FEW_SENTENCES, FEW_PART = 10, 1e-3
_SHOWN = 8


class Languages:
    """The languages that tags name, and how many sentences of a training set each has.

    Args:
        tags: finds them
        words: the tags, in the order of the pools
        side: where they are: ``source`` or ``target``
        counts: sentences of each pool

    Attributes:
        pools: the languages, and last the name of the sentences without a tag
        words: as it was given
        side: as it was given
        counts: as it was given
        identity: how a sentence's language is found; the order of listed tags does not matter to it
    """

    def __init__(self, tags: LanguageTags, words: List[str], side: str, counts: List[int], identity: str = "") -> None:
        self._tags = tags
        self.pools, self.words, self.side, self.counts, self.identity = tags.pools, words, side, counts, identity

    def of_batch(self, sample: Dict[str, Any]) -> Tensor:
        """The language of each sentence of a batch.

        Args:
            sample: a batch; of the target's side the decoder's first input counts, too

        Returns:
            index into `pools`, shape ``(B,)``, int64
        """
        if self.side == "source":
            return self._tags.of_sentences(sample["net_input"]["src_tokens"])
        first = sample["net_input"]["prev_output_tokens"][:, :1]
        return self._tags.of_sentences(torch.cat([first, sample["target"]], dim=1))

    def has_identity(self, identity: str) -> bool:
        """Whether an identity is this one's; those of earlier versions have a list in the order that was given."""
        ours, theirs = (sorted(text.replace(" ", ",").split(",")) for text in (self.identity, identity))
        return ours == theirs

    @property
    def names(self) -> Dict[str, int]:
        """By what a language can be called, its pool: its name, its tag, and the tag without its prefix."""
        names = {name: pool for pool, name in enumerate(self.pools[:-1])}
        for pool, word in enumerate(self.words):
            names.setdefault(word, pool)
            for start in range(1, len(word)):  # without a prefix, as checkpoints of earlier versions have it
                if word[start:].startswith(self.pools[pool]):
                    names.setdefault(word[start:], pool)
        return names


class _Tags(NamedTuple):
    """What the flags say: `words` by id, or a prefix that those of `candidates` have."""

    flag: str
    words: Dict[int, str]
    candidates: Dict[int, str]
    prefix: str


def find_languages(task: Any) -> Languages:
    """Find the tags that the task's settings name, and count them over its training set.

    Raises:
        ConfigError: a flag cannot be used: a tag that is not in the dictionary, a prefix that no sentence has, ...
    """
    side = task.cfg.kd_language_side
    words = task.source_dictionary if side == "source" else task.target_dictionary
    specials = {*range(words.nspecial), words.bos(), words.pad(), words.eos(), words.unk()}
    if BOUNDARY in words.indices:
        specials.add(words.indices[BOUNDARY])
    found = _read_flags(task.cfg, words, specials, side)
    if found.words:
        tags = LanguageTags(found.words, len(words), specials)
        counts = _count(_TrainingSet(task, side, specials), tags)
        tagged = list(found.words.values())
        languages = Languages(tags, tagged, side, counts, f"{side} {','.join(sorted(tagged))}")
        _log(found.flag, languages)
    else:
        languages = _by_places(_TrainingSet(task, side, specials), side, words, specials, found)
    _warn_of_few(found.flag, languages)
    return languages


def _read_flags(cfg: Any, words: Dictionary, specials: Set[int], side: str) -> _Tags:
    if cfg.kd_language_tags is None:
        return _read_prefix(cfg.kd_language_tag, words, specials, side)
    flag = f"{LIST_FLAG} {cfg.kd_language_tags}"
    if cfg.kd_language_tag != DEFAULT_PREFIX:
        raise ConfigError(f"{flag}: there is {PREFIX_FLAG} {cfg.kd_language_tag} as well; leave one of the two out")
    if cfg.kd_language_tags not in words.indices:
        check_path(LIST_FLAG, cfg.kd_language_tags)
    return _Tags(flag, _read_list(flag, cfg.kd_language_tags, words, specials, side), {}, "")


def _read_prefix(prefix: str, words: Dictionary, specials: Set[int], side: str) -> _Tags:
    flag = f"{PREFIX_FLAG} {prefix}"
    if not prefix:
        raise ConfigError(
            f"{PREFIX_FLAG} '': empty, so that every word would be a language; a prefix, as __src__ of __src__hi"
        )
    candidates = {
        i: word
        for i, word in enumerate(words.symbols)
        if word.startswith(prefix) and len(word) > len(prefix) and i not in specials
    }
    if not candidates:
        raise ConfigError(
            f"{flag}: no word of the {side} dictionary begins with it; begin each {side} sentence with such a tag "
            f"(__src__hi __tgt__en), name the prefix that yours have, or list them by {LIST_FLAG}"
        )
    if len(candidates) > MOST_CANDIDATES:
        raise ConfigError(
            f"{flag}: {len(candidates):,} words of the {side} dictionary begin with it; name a longer prefix, or list "
            f"the tags by {LIST_FLAG}"
        )
    return _Tags(flag, {}, candidates, prefix)


def _read_list(flag: str, given: str, words: Dictionary, specials: Set[int], side: str) -> Dict[int, str]:
    is_file = os.path.exists(given) and given not in words.indices
    tags = _lines(flag, given) if is_file else [tag.strip() for tag in given.split(",")]
    found: Dict[int, str] = {}
    for tag in tags:
        index = words.indices.get(tag)
        if not tag:
            raise ConfigError(f"{flag}: an empty word; tags joined by commas, or a file with one in each line")
        if index is None:
            near = difflib.get_close_matches(tag, words.symbols, n=3)
            remedy = f"near to it: {', '.join(near)}" if near else "tags are words of the preprocessed data"
            no_file = "" if is_file or len(tags) > 1 else "no such file, and "
            raise ConfigError(f"{flag}: {no_file}'{tag}' is not in the {side} dictionary; {remedy}")
        if index in specials:
            raise ConfigError(f"{flag}: '{tag}' is a special symbol, which all sentences have; name words")
        if index in found:
            raise ConfigError(f"{flag}: '{tag}' is there twice; name each once")
        found[index] = tag
    if not found:
        raise ConfigError(f"{flag}: there is no tag in it; one in each line")
    return found


def _lines(flag: str, path: str) -> List[str]:
    """The lines of a small text file, without the empty ones."""
    try:
        require_regular(path)
    except ConfigError as error:
        raise ConfigError(f"{LIST_FLAG} {error}, or tags as they are in the dictionary") from error
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: cannot be read as text: {error}; a file with one tag in each line") from error


def _by_places(
    training_set: "_TrainingSet", side: str, words: Dictionary, specials: Set[int], given: _Tags
) -> Languages:
    places = TagPlaces(len(words), given.candidates, specials)
    for sentences in training_set.sentences("looking for language tags"):
        places.look(sentences)
    for sentences in training_set.sentences("counting language tags"):
        places.count(sentences)
    found = places.tags()
    if not found.tags:
        raise ConfigError(
            f"{given.flag}: no sentence of the training set begins or ends with a tag, though {len(given.candidates)} "
            f"words of the {side} dictionary begin so ({_some(given.candidates.values())}); name tags by {LIST_FLAG}"
        )
    tagged = [words.symbols[i] for i in found.tags]
    names = _without_closing([word[len(given.prefix) :] for word in tagged])
    leading = places.leading
    tags = LanguageTags(dict(zip(found.tags, names)), len(words), specials, leading)
    counts = [*found.tags.values(), found.untagged]
    languages = Languages(tags, tagged, side, counts, f"{side} {given.prefix}*")
    _log(given.flag, languages)
    for what, ids in (("only stand before a tag", found.marks), ("stand anywhere in sentences", found.words)):
        if ids:
            logger.info(
                "%s: these begin so, too, but %s, and name no language: %s; if they do, list the tags by %s",
                *(given.flag, what, _some(words.symbols[i] for i in ids), LIST_FLAG),
            )
    return languages


def _without_closing(names: List[str]) -> List[str]:
    """``hi`` for ``hi__`` where all end so: in signs that are no letters."""
    backwards = os.path.commonprefix([name[::-1] for name in names])
    closing = "".join(itertools.takewhile(lambda sign: not sign.isalnum(), backwards))
    if not closing or any(len(name) == len(closing) for name in names):
        return names
    return [name[: -len(closing)] for name in names]


def _count(training_set: "_TrainingSet", tags: LanguageTags) -> List[int]:
    """How many sentences of the training set each pool has, where a tag counts wherever it stands."""
    counts = np.zeros(len(tags.pools), dtype=np.int64)
    table = tags.of_words()
    for sentences in training_set.sentences("counting language tags"):
        language = table[sentences.tokens]
        hits = np.flatnonzero(language >= 0)
        numbers = np.searchsorted(np.cumsum(sentences.sizes), hits, side="right")
        _, first = np.unique(numbers, return_index=True)
        counts += np.bincount(language[hits[first]], minlength=len(counts))
        counts[-1] += len(sentences.sizes) - len(first)
    return counts.tolist()


class _TrainingSet:
    """The sentences of one side of a task's training set: all parts of it, if ``DATA`` names several."""

    def __init__(self, task: Any, side: str, specials: Set[int]) -> None:
        split = task.cfg.train_subset
        before, buckets = task.datasets.get(split), task.cfg.num_batch_buckets
        task.cfg.num_batch_buckets = 0  # padding is of no interest here
        self._parts = []
        try:
            for epoch in range(1, 1 + len(utils.split_paths(task.cfg.data))):  # a part of the data an epoch
                task.load_dataset(split, epoch=epoch, combine=True)
                self._parts.append(task.datasets.pop(split))
        finally:
            task.cfg.num_batch_buckets = buckets
            if before is not None:
                task.datasets[split] = before
        self._side, self._specials = side, specials
        self._words = len(task.source_dictionary if side == "source" else task.target_dictionary)
        self._names = [f"{folder}: the {side} of its {split} set" for folder in utils.split_paths(task.cfg.data)]

    def sentences(self, doing: str) -> Iterator[Sentences]:
        """All of them, some at a time, with a bar that says what is being done."""
        total = sum(len(part) for part in self._parts)
        with tqdm(desc=doing, total=total, unit="sentence", leave=False, delay=2, mininterval=2) as bar:
            for part, name in zip(self._parts, self._names):
                for sentences in sentences_of(part.src if self._side == "source" else part.tgt):
                    check_words(sentences.tokens, self._words, name)
                    if self._side == "target" and part.eos not in self._specials:  # what the decoder begins with
                        tokens = np.insert(sentences.tokens, sentences.starts, part.eos)
                        sentences = Sentences(tokens, sentences.sizes + 1)
                    yield sentences
                    bar.update(len(sentences.sizes))


def _log(flag: str, languages: Languages) -> None:
    of_each = [
        f"{name} {count:,}" if name == word else f"{name} ({word}) {count:,}"
        for name, word, count in zip(languages.pools, languages.words, languages.counts)
    ]
    logger.info(
        "%s: languages of the training set's %s sentences, by tags of the %s: %s; %s %s",
        *(flag, f"{sum(languages.counts):,}", languages.side, ", ".join(of_each)),
        *(languages.pools[-1], f"{languages.counts[-1]:,}"),
    )


def _warn_of_few(flag: str, languages: Languages) -> None:
    of_languages = dict(zip(languages.pools[:-1], languages.counts))
    least = max(FEW_SENTENCES, FEW_PART * sum(languages.counts) / len(of_languages))
    few = [f"{name} {count}" for name, count in of_languages.items() if count < least]
    if few:
        logger.warning("%s: next to no sentence is of %s", flag, ", ".join(few))


def _some(words: Any) -> str:
    words = list(words)
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")

"""Which of the words that look like language tags are some: where they stand in a training set tells it.

A prefix such as ``[`` is that of ``[hi_IN]`` and of ``[1]``, and ``__`` that of ``__hi__`` and of ``__bt__``, which
marks translations that were made by a machine.
"""

from collections import Counter
from typing import Collection, Dict, Iterator, List, NamedTuple, Set, Tuple
from typing import Counter as Counts

import numpy as np

MOST_CANDIDATES = 2**16 - 1
HEAD, TAIL = 8, 4  # so many tokens are looked at, at the beginning and at the end of a sentence
_KEPT = HEAD - 1  # candidates of a run
# of the places where a word stands, the part that must be those of tags
_MOST = 0.5
# and the part that must be before a candidate, of a word that is none, for a run to go on behind it
_BEFORE_CANDIDATES = 0.9
# how often a run must be found by itself, for each time that something stands before it
_BY_ITSELF = 0.01
WORD, SPECIAL, LEADING = 0, 1, 2  # kinds of words

# the candidates that lead a sentence, and the one that ends it (0: none)
Place = Tuple[Tuple[int, ...], int]


class Sentences(NamedTuple):
    """Some sentences, one after the other.

    Attributes:
        tokens: vocabulary ids, shape ``(m,)``
        sizes: tokens of each sentence, shape ``(n,)``, over 0
    """

    tokens: np.ndarray
    sizes: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.sizes) - self.sizes


class TagPlaces:
    """Counts where candidates stand. All sentences are shown to :meth:`look` first, then to :meth:`count`.

    Args:
        vocabulary: how many words there are
        candidates: ids of the words that begin as a tag does, at most 65,535
        specials: ids of symbols that are no words

    Attributes:
        leading: ids of the words that stand at the beginning before a tag or as one, after :meth:`look`
    """

    def __init__(self, vocabulary: int, candidates: Collection[int], specials: Collection[int]) -> None:
        self._candidates = np.array(sorted(candidates), dtype=np.int64)
        self._numbers = np.zeros(vocabulary, dtype=np.int64)  # of candidates, from 1; 0: none
        self._numbers[self._candidates] = np.arange(1, 1 + len(self._candidates))
        self._kinds = np.full(vocabulary, WORD, dtype=np.int8)
        self._kinds[self._candidates] = LEADING
        self._kinds[list(specials)] = SPECIAL
        self._occurrences = np.zeros(vocabulary, dtype=np.int64)
        self._before = np.zeros(vocabulary, dtype=np.int64)
        self._places: Counts[Place] = Counter()

    def look(self, sentences: Sentences) -> None:
        """Count all words, and those that stand before a candidate."""
        self._occurrences += np.bincount(sentences.tokens, minlength=len(self._kinds))
        head, is_there = _beginnings(sentences)
        is_candidate = (self._numbers[head] > 0) & is_there
        first = np.where(is_candidate.any(1), is_candidate.argmax(1), 0)
        is_before = np.arange(HEAD) < first[:, None]
        self._before += np.bincount(head[is_before], minlength=len(self._kinds))

    @property
    def leading(self) -> Set[int]:
        goes_on = (self._before > 0) & (self._before >= _BEFORE_CANDIDATES * self._occurrences)
        return {*self._candidates.tolist(), *np.flatnonzero(goes_on & (self._kinds == WORD)).tolist()}

    def count(self, sentences: Sentences) -> None:
        """Count the runs of candidates that lead sentences, and what ends them."""
        kinds = self._kinds.copy()
        kinds[list(self.leading)] = LEADING
        head, is_there = _beginnings(sentences)
        is_run = np.cumprod((kinds[head] != WORD) & is_there, axis=1).astype(bool)
        numbers = self._numbers[head] * is_run  # n x HEAD
        in_run = np.argsort(numbers == 0, axis=1, kind="stable")[:, :_KEPT]
        lead = np.take_along_axis(numbers, in_run, axis=1)

        tail, is_there = _ends(sentences)
        last = ((kinds[tail] != SPECIAL) & is_there).argmax(1)
        rows = np.arange(len(last))
        ends = self._numbers[tail[rows, last]] * is_there[rows, last]
        place = sentences.sizes - 1 - last
        ends[is_run[rows, np.clip(place, 0, HEAD - 1)] & (place < HEAD)] = 0

        columns = np.column_stack([lead, ends]).astype(np.uint16)  # n x 8
        for row, times in _distinct(columns):
            self._places[tuple(x for x in row[:_KEPT] if x), row[_KEPT]] += times

    def tags(self) -> "Found":
        """Which candidates name a language, and of how many sentences."""
        placed: Counts[int] = Counter()
        for (lead, last), times in self._places.items():
            for number in (*lead, last):
                placed[number] += times
        occurrences = self._occurrences[self._candidates].tolist()
        tags = {i for i, count in enumerate(occurrences, 1) if count > 0 and placed[i] >= _MOST * count}
        words = {i for i, count in enumerate(occurrences, 1) if count > 0} - tags
        marks: Set[int] = set()
        while True:
            runs = self._runs(tags)
            found = _needless(runs)
            if not found:
                break
            marks |= found
            tags -= found
        named: Counts[int] = Counter()
        for run, times in runs.items():
            named[run[0] if run else 0] += times
        of_number = dict(enumerate(self._candidates.tolist(), 1))
        return Found(
            {of_number[i]: named[i] for i in sorted(named) if i},
            named[0],
            sorted(of_number[i] for i in marks),
            sorted(of_number[i] for i in words),
        )

    def _runs(self, tags: Set[int]) -> Counts[Tuple[int, ...]]:
        runs: Counts[Tuple[int, ...]] = Counter()
        for (lead, last), times in self._places.items():
            runs[tuple(number for number in (*lead, last) if number in tags)] += times
        return runs


class Found(NamedTuple):
    """What is known of the candidates.

    Attributes:
        tags: ids of those that name a language, and how many sentences each names
        untagged: how many sentences have none
        marks: ids of those that only stand before a tag
        words: ids of those that stand anywhere
    """

    tags: Dict[int, int]
    untagged: int
    marks: Collection[int]
    words: Collection[int]


def _needless(runs: Counts[Tuple[int, ...]]) -> Set[int]:
    """What leads runs most of which are found by themselves, too: a mark, or a word that happens to look like a tag."""
    led: Counts[int] = Counter()
    needless: Counts[int] = Counter()
    for run, times in runs.items():
        if run:
            led[run[0]] += times
            if len(run) > 1 and runs[run[1:]] >= _BY_ITSELF * times:
                needless[run[0]] += times
    return {number for number, times in led.items() if needless[number] > _MOST * times}


def _distinct(columns: np.ndarray) -> Iterator[Tuple[List[int], int]]:
    """The distinct rows of shape ``(n, 8)``, uint16, and how often each is there: four columns are a whole number."""
    halves = [np.unique(half, return_inverse=True) for half in columns.view(np.uint64).T]
    (_, first), (seconds, second) = halves
    _, at, counts = np.unique(first.ravel() * len(seconds) + second.ravel(), return_index=True, return_counts=True)
    yield from zip(columns[at].tolist(), counts.tolist())


def _beginnings(sentences: Sentences) -> Tuple[np.ndarray, np.ndarray]:
    """The first tokens of each sentence, shape ``(n, HEAD)``, and which of them there are."""
    return _gather(sentences, np.arange(HEAD)[None].repeat(len(sentences.sizes), 0))


def _ends(sentences: Sentences) -> Tuple[np.ndarray, np.ndarray]:
    """The last tokens, the last one first, shape ``(n, TAIL)``, and which of them there are."""
    return _gather(sentences, sentences.sizes[:, None] - 1 - np.arange(TAIL))


def _gather(sentences: Sentences, places: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    is_there = (places >= 0) & (places < sentences.sizes[:, None])
    return sentences.tokens[np.where(is_there, sentences.starts[:, None] + places, 0)], is_there

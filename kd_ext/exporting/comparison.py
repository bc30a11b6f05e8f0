"""Two models on the same sentences."""

import math
from typing import Any, List, NamedTuple, Sequence

from tqdm import tqdm

from kd_ext.exporting.translators import Tokens

_AT_ONCE = 32


class Comparison(NamedTuple):
    """What was found.

    Attributes:
        sentences: how many were translated
        endless: that both translate with as many words as they may, at which each breaks off in its own way
        differing: of the others, translations that are not the same words
        score: the largest difference between log-probabilities that both give a word of the first's translations; not
            a number, if one of them is none
        longest: as many words as both may translate with
    """

    sentences: int
    endless: int
    differing: int
    score: float
    longest: int

    def __str__(self) -> str:
        endless = f" ({self.endless} reach {self.longest} words in both, and are not compared)" if self.endless else ""
        return (
            f"{self.differing} of {self.sentences - self.endless} translations differ{endless}; log-probabilities of a "
            f"word by {self.score:.2g} at most"
        )


def compare(first: Any, second: Any, sentences: Sequence[Tokens], title: str) -> Comparison:
    """Translate with two translators, and let both score each word of what the first said.

    Args:
        first, second: from :mod:`kd_ext.exporting.translators`
        title: of the progress bar
    """
    endless, differing, score = 0, 0, 0.0
    longest = min(first.longest_translation, second.longest_translation)
    with tqdm(total=len(sentences), unit="sentence", desc=title) as bar:
        for start in range(0, len(sentences), _AT_ONCE):
            batch = list(sentences[start : start + _AT_ONCE])
            ours, theirs = first.translate(batch, longest), second.translate(batch, longest)
            ended = [min(len(a), len(b)) < longest for a, b in zip(ours, theirs)]
            endless += ended.count(False)
            differing += sum(a != b for a, b, both in zip(ours, theirs, ended) if both)
            score = _largest([score, *_differences(first.score(batch, ours), second.score(batch, ours))])
            bar.update(len(batch))
    return Comparison(len(sentences), endless, differing, score, longest)


def _differences(ours: List[List[float]], theirs: List[List[float]]) -> List[float]:
    """Of each word; none where both say that it cannot be."""
    return [0.0 if x == y else abs(x - y) for a, b in zip(ours, theirs) for x, y in zip(a, b)]


def _largest(values: List[float]) -> float:
    return next(filter(math.isnan, values), max(values))  # whatever max makes of what is no number

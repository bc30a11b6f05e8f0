"""Which of a teacher's translations of a sentence is taken, and which is none."""

from typing import Any, Callable, List, NamedTuple, Optional, Sequence

CHOICES = ("best", "closest", "all")
CLOSENESS = ("chrf", "bleu")
# a loop: so many of one n-gram of up to so many words in a row
LOOPS, LONGEST_LOOP = 5, 4


class Hypothesis(NamedTuple):
    """A translation.

    Attributes:
        tokens: its words, without eos
        score: the teacher's, by the length penalty, in bits
        at_limit: whether it was cut off at the length limit
    """

    tokens: List[int]
    score: float
    at_limit: bool


class Taken(NamedTuple):
    """What became of a hypothesis.

    Attributes:
        choice: its place among the n-best, from 1
        failure: why it is none, or ''
    """

    hypothesis: Hypothesis
    choice: int
    failure: str


def failure_of(hypothesis: Hypothesis, source_length: int, most_times: float, vocabulary: int) -> str:
    """Why a hypothesis is no translation: ``empty``, ``limit``, ``loop``, ``ratio``, ``words``; '' if it is one.

    Args:
        source_length: tokens without eos
        most_times: by which one side may be as long as the other
        vocabulary: what is not under it is no word of the student's
    """
    tokens = hypothesis.tokens
    if not tokens:
        return "empty"
    if hypothesis.at_limit:
        return "limit"
    if has_loop(tokens):
        return "loop"
    if max(len(tokens), source_length) > most_times * max(1, min(len(tokens), source_length)):
        return "ratio"
    return "words" if max(tokens) >= vocabulary else ""


def has_loop(tokens: Sequence[int]) -> bool:
    """Whether one n-gram of 1 to 4 words follows itself at least five times in a row."""
    for n in range(1, LONGEST_LOOP + 1):
        same = 0  # words in a row that are the same as n before
        for before, now in zip(tokens, tokens[n:]):
            same = same + 1 if before == now else 0
            if same >= n * (LOOPS - 1):
                return True
    return False


def choose(
    hypotheses: Sequence[Hypothesis],
    choice: str,
    closeness: Optional[Callable[[List[int]], float]],
    failure: Callable[[Hypothesis], str],
) -> List[Taken]:
    """What is taken of the n-best of a sentence, the best first.

    The first of equals is taken. What is taken may be a failure; of ``all`` those are left out unless all fail.

    Args:
        closeness: of a hypothesis's tokens to the reference, for ``closest``
    """
    if choice == "all":
        every = [Taken(h, i + 1, failure(h)) for i, h in enumerate(hypotheses)]
        return [taken for taken in every if not taken.failure] or every[:1]
    place = 0
    if choice == "closest":
        assert closeness is not None
        values = [closeness(h.tokens) for h in hypotheses]
        place = values.index(max(values))
    return [Taken(hypotheses[place], place + 1, failure(hypotheses[place]))]


def sentence_metric(name: str) -> Callable[[str, str], float]:
    """sacrebleu's chrF or BLEU of one sentence, from hypothesis and reference."""
    import sacrebleu

    metric: Any = sacrebleu.sentence_chrf if name == "chrf" else sacrebleu.sentence_bleu
    return lambda hypothesis, reference: float(metric(hypothesis, [reference]).score)

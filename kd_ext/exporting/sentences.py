"""Sentences to compare two models on."""

import os
import random
from typing import Any, List, NamedTuple, Sequence

from fairseq.data import Dictionary, data_utils

SUBSETS = ("test", "valid", "train")
_LONGEST = 100  # tokens


class Sentences(NamedTuple):
    """Words of the source dictionary, by sentence, and a phrase for where they are from."""

    tokens: List[List[str]]
    origin: str


def sentences_for(folder: str, source: str, target: str, words: Dictionary, count: int, longest: int) -> Sentences:
    """So many sentences of the data in a folder, spread over its test set or what it has; or of random words.

    Args:
        folder: maybe with binarized data
        source, target: languages
        words: the source dictionary
        count: how many at most
        longest: that the models take, in tokens
    """
    for subset in SUBSETS:
        prefix = os.path.join(folder, f"{subset}.{source}-{target}.{source}")
        data: Any = data_utils.load_indexed_dataset(prefix, words) if os.path.isfile(f"{prefix}.idx") else None
        if data is not None and len(data):
            fitting = [i for i, size in enumerate(data.sizes) if size <= min(longest, _LONGEST)]
            chosen = fitting[:: max(1, len(fitting) // count)][:count]
            tokens = [[words[i] for i in data[n].tolist() if i != words.eos()] for n in chosen]
            return Sentences(list(filter(None, tokens)), f"of {prefix}")
    return random_sentences(words.symbols, count, longest)


def random_sentences(symbols: Sequence[str], count: int, longest: int) -> Sentences:
    """Sentences of random words, the same each time; `symbols`: with fairseq's special ones first."""
    words = symbols[Dictionary().nspecial :]
    chooser = random.Random(1)
    lengths = [chooser.randint(1, max(1, min(20, longest - 1))) for _ in range(count)]
    return Sentences([[chooser.choice(words) for _ in range(n)] for n in lengths], "of random words")

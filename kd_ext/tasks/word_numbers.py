"""Binarized data has words by number: those of another dictionary can be more than there are."""

from typing import Any, Iterator

import numpy as np
from fairseq.data import BaseWrapperDataset, ConcatDataset
from fairseq.data.indexed_dataset import MMapIndexedDataset

from kd_ext.errors import ConfigError
from kd_ext.upstream.flat_tokens import sentences_of


def check_words(tokens: np.ndarray, words: int, name: str) -> None:
    """See that all tokens are words of a dictionary.

    Args:
        tokens: vocabulary ids
        words: how many there are
        name: of the data, for the message

    Raises:
        ConfigError: one is not
    """
    largest = int(tokens.max(initial=0))
    if largest >= words:
        raise ConfigError(
            f"{name} was binarized with another dictionary (word {largest} of {words}); preprocess it again"
        )


def check_binarized(dataset: Any, words: int, name: str) -> None:
    """The same of a data set, as far as it is read from what ``fairseq-preprocess`` writes: other kinds take long."""
    for part in _mapped(dataset):
        for sentences in sentences_of(part):
            check_words(sentences.tokens, words, name)


def _mapped(dataset: Any) -> Iterator[MMapIndexedDataset]:
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _mapped(part)
    elif isinstance(dataset, BaseWrapperDataset):
        yield from _mapped(dataset.dataset)
    elif type(dataset) is MMapIndexedDataset:
        yield dataset

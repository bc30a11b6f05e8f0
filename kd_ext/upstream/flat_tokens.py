"""Many sentences of a data set at once: upstream gives them one by one, which takes minutes for tens of millions."""

from typing import Any, Iterator

import numpy as np
from fairseq.data.indexed_dataset import MMapIndexedDataset

from kd_ext.modules.tag_places import Sentences

SENTENCES = 2**18  # at once


def sentences_of(dataset: Any) -> Iterator[Sentences]:
    """All sentences of a data set of token ids, in its order, some at a time.

    What ``fairseq-preprocess`` wrote is one array on disk, a sentence after the other, and is read as such (fairseq
    0.12.2 has no public way to it). Of other data sets each sentence is asked for.
    """
    for start in range(0, len(dataset), SENTENCES):
        stop = min(start + SENTENCES, len(dataset))
        flat = _flat(dataset, start, stop) if type(dataset) is MMapIndexedDataset else None
        if flat is None:
            each = [dataset[i].numpy() for i in range(start, stop)]
            flat = Sentences(np.concatenate(each), np.array([len(sentence) for sentence in each]))
        yield flat


def _flat(dataset: MMapIndexedDataset, start: int, stop: int) -> Any:
    index = dataset._index
    sizes, pointers = index._sizes[start:stop], index._pointers[start:stop]
    item = np.dtype(index.dtype).itemsize
    if not np.array_equal(pointers[1:], pointers[:-1] + item * sizes[:-1].astype(np.int64)):
        return None
    tokens = np.frombuffer(dataset._bin_buffer, index.dtype, count=int(sizes.sum(dtype=np.int64)), offset=pointers[0])
    return Sentences(tokens, sizes.astype(np.int64))

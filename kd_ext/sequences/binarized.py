"""Binarized data, as fairseq-preprocess writes it."""

import os
import shutil
from typing import Any, Iterable, List, Sequence

import torch
from fairseq.data import indexed_dataset


def write_side(prefix: str, sentences: Iterable[Sequence[int]], words: Any) -> None:
    """Write ``prefix.bin`` and ``prefix.idx``.

    Args:
        sentences: their tokens, without eos, which is added
        words: the dictionary
    """
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(words))
    for sentence in sentences:
        builder.add_item(torch.tensor([*sentence, words.eos()], dtype=torch.int32))
    builder.finalize(f"{prefix}.idx")


def copy_rest(data: str, destination: str, source: str, target: str, subset: str) -> List[str]:
    """Copy the dictionaries and the sets beside the training set; returns the names of the files.

    Those of data that was preprocessed the other way round are named as the training set: fairseq reads the languages
    off the first name that it meets.
    """
    copied = []
    for name in sorted(os.listdir(data)):
        is_dictionary = name in (f"dict.{source}.txt", f"dict.{target}.txt")
        of_pair = any(f".{pair}." in name for pair in (f"{source}-{target}", f"{target}-{source}"))
        if (is_dictionary or (of_pair and not _is_of(name, subset))) and os.path.isfile(os.path.join(data, name)):
            new = name.replace(f".{target}-{source}.", f".{source}-{target}.", 1)
            shutil.copyfile(os.path.join(data, name), os.path.join(destination, new))
            copied.append(new)
    return copied


def _is_of(name: str, subset: str) -> bool:
    """Whether a file is of ``train``, ``train1``, ..."""
    own = name.split(".")[0]
    return own == subset or (own.startswith(subset) and own[len(subset) :].isdigit())

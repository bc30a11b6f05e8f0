"""Binarized data, as fairseq-preprocess writes it."""

import os
import shutil
from typing import Any, Iterable, Optional, Sequence

import torch
from fairseq.data import data_utils, indexed_dataset
from torch import Tensor

_OLD = b"TNTIDX"  # how an index begins of what --dataset-impl lazy or cached writes


def write_side(prefix: str, sentences: Iterable[Sequence[int]], words: Any) -> None:
    """Write ``prefix.bin`` and ``prefix.idx``.

    Args:
        sentences: their tokens, without eos, which is added
        words: the dictionary
    """
    _write(prefix, (torch.tensor([*sentence, words.eos()], dtype=torch.int32) for sentence in sentences), words)


def _write(prefix: str, sentences: Iterable[Tensor], words: Any) -> None:
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(words))
    for sentence in sentences:
        builder.add_item(sentence)
    builder.finalize(f"{prefix}.idx")


def copy_rest(task: Any, data: str, destination: str, subset: str) -> None:
    """Copy the dictionaries and the sets beside the training set.

    Those of data that was preprocessed the other way round are named as the training set: fairseq reads the languages
    off the first name that it meets. Sets of text, and those of the old format, are written as the training set, too:
    fairseq reads all that it trains on by one ``--dataset-impl``.

    Args:
        task: gives the languages and their dictionaries
    """
    source, target = task.cfg.source_lang, task.cfg.target_lang
    names = sorted(os.listdir(data))
    is_binarized = any(_is_of(name, subset) and name.endswith(f".{source}.idx") for name in names)
    is_text = task.cfg.dataset_impl == "raw" or (task.cfg.dataset_impl is None and not is_binarized)
    for name in names:
        path = os.path.join(data, name)
        is_dictionary = name in (f"dict.{source}.txt", f"dict.{target}.txt")
        of_pair = any(f".{pair}." in name for pair in (f"{source}-{target}", f"{target}-{source}"))
        if not (is_dictionary or (of_pair and not _is_of(name, subset))) or not os.path.isfile(path):
            continue
        new = os.path.join(destination, name.replace(f".{target}-{source}.", f".{source}-{target}.", 1))
        prefix, new_prefix = _without_ending(path), _without_ending(new)
        is_side = not is_dictionary and prefix.endswith((f".{source}", f".{target}"))
        impl = _other_format(path, prefix, is_text) if is_side else None
        if impl is None:
            shutil.copyfile(path, new)
        elif not name.endswith(".idx"):  # which is read with its .bin
            words = task.source_dictionary if prefix.endswith(f".{source}") else task.target_dictionary
            side = data_utils.load_indexed_dataset(prefix, words, impl)
            _write(new_prefix, (side[i] for i in range(len(side))), words)


def _without_ending(path: str) -> str:
    return os.path.splitext(path)[0] if path.endswith((".bin", ".idx")) else path


def _other_format(path: str, prefix: str, is_text: bool) -> Optional[str]:
    """By what ``--dataset-impl`` a file is read that is to be written anew; None: it stays as it is."""
    has_index = os.path.isfile(f"{prefix}.idx")
    if path == prefix:  # text, which can also lie beside what was made of it
        return "raw" if is_text and not has_index else None
    if not has_index:
        return None
    with open(f"{prefix}.idx", "rb") as index:
        return "lazy" if index.read(len(_OLD)) == _OLD else None


def _is_of(name: str, subset: str) -> bool:
    """Whether a file is of ``train``, ``train1``, ..."""
    own = name.split(".")[0]
    return own == subset or (own.startswith(subset) and own[len(subset) :].isdigit())

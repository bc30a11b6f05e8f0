"""A set that fairseq-preprocess wrote: the tokens of its sentences, and an index of where each begins."""

import logging
import os
import struct
from typing import BinaryIO, Tuple

import numpy as np
import torch
from fairseq.data import indexed_dataset
from fairseq.data.indexed_dataset import IndexedDataset, data_file_path, index_file_path
from torch import Tensor

from kd_ext.errors import ConfigError

logger = logging.getLogger(__name__)

_MMAP, _OLD = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_HUFFMAN = b"HUFFIDX\x00\x00"
_BEGINNINGS = {"mmap": _MMAP, "lazy": _OLD, "cached": _OLD}  # of an index, by --dataset-impl
_AT_ONCE = 2**22  # sentences
_REMEDY = "copy both files again from where fairseq-preprocess wrote them, or preprocess again"


def apply() -> None:
    """Say that a set is damaged or empty before it is read, and read one of the old format (fairseq 0.12.2).

    Of a file that was cut off fairseq notices when it comes to a sentence that is not there, in mid-training maybe.
    What ``--dataset-impl lazy`` or ``cached`` wrote it takes for "cached", which has no sentence before an epoch
    begins, and asks for one before: a KeyError. As "lazy" the processes of ``--num-workers`` read through one open
    file, and move it under each other: now and then a sentence is another.
    """
    original = indexed_dataset.make_dataset
    if getattr(original, "_kd_ext", False):
        return

    def make_dataset(path, impl, fix_lua_indexing=False, dictionary=None):
        if impl in _BEGINNINGS and IndexedDataset.exists(path):
            _check(path, impl)
            if impl != "mmap":
                return OldFormat(path, fix_lua_indexing)
        return original(path, impl, fix_lua_indexing, dictionary)

    make_dataset._kd_ext = True
    indexed_dataset.make_dataset = make_dataset


class OldFormat(IndexedDataset):
    """Sentences of token ids, each of shape ``(length,)``, int64; their file is mapped into memory."""

    def __init__(self, path: str, fix_lua_indexing: bool = False) -> None:
        super().__init__(path, fix_lua_indexing)
        self._tokens = np.memmap(data_file_path(path), self.dtype, mode="r")

    def __reduce__(self):
        return OldFormat, (self.path, self.fix_lua_indexing)

    def __getitem__(self, i: int) -> Tensor:
        self.check_index(i)
        tokens = self._tokens[self.data_offsets[i] : self.data_offsets[i + 1]].astype(np.int64)
        return torch.from_numpy(tokens - 1 if self.fix_lua_indexing else tokens)


def _check(path: str, impl: str) -> None:
    """See that the two files of a set are of a format, and whole, as far as their sizes tell.

    Raises:
        ConfigError: they are not, or there is no sentence
    """
    index, tokens = index_file_path(path), data_file_path(path)
    with open(index, "rb") as file:
        begins = file.read(len(_MMAP))
        if begins.startswith((_MMAP, _OLD, _HUFFMAN)) and not begins.startswith(_BEGINNINGS[impl]):
            raise ConfigError(f"--dataset-impl {impl}: {path} is in another format; leave it out, as files tell theirs")
        try:
            wanted = _bytes_of_tokens(file, _BEGINNINGS[impl])
        except (struct.error, KeyError) as error:
            raise ConfigError(f"{index}: no whole index of a set; {_REMEDY}") from error
    if wanted == 0:
        raise ConfigError(
            f"{path}: a set without a sentence; name one that has some (--train-subset, --valid-subset, --gen-subset), "
            "or do without validation (--disable-validation)"
        )
    found = os.path.getsize(tokens)
    if found < wanted:
        raise ConfigError(f"{tokens}: cut off: it has {found:,} bytes of the {wanted:,} of its index; {_REMEDY}")
    if found > wanted:
        logger.warning(
            "%s: its index ends %s bytes before it does; is it of the same data?", tokens, f"{found - wanted:,}"
        )


def _bytes_of_tokens(file: BinaryIO, begins: bytes) -> int:
    """How many an index has places for.

    Raises:
        struct.error: it is shorter than it says itself
        KeyError: it is of another kind, or its tokens are of no type that fairseq knows
    """

    def read(form: str, place: int) -> Tuple[int, ...]:
        file.seek(place)
        return struct.unpack(form, file.read(struct.calcsize(form)))

    if read(f"{len(begins)}s", 0) != (begins,):
        raise KeyError(begins)
    if begins == _MMAP:  # then version, dtype, count, 4 bytes for each length, 8 for each place
        code, count = read("<BQ", 17)
        if count == 0:
            return 0
        read("<q", 26 + 12 * count - 8)  # the last place
        return _end(file.name, count, np.dtype(indexed_dataset._code_to_dtype[code]).itemsize)
    # then version, dtype, bytes of a token, counts of sentences and of lengths, shapes' and sentences' places, lengths
    size, count, lengths = read("<QQQ", 24)
    (end,) = read("<q", 48 + 8 * (2 * count + 1))
    if lengths:
        read("<q", 48 + 8 * (2 * count + 1 + lengths))
    return end * size


def _end(index: str, count: int, size: int) -> int:
    """Where the last token of all ends; sentences may be in another order than their tokens."""
    lengths = np.memmap(index, "<i4", mode="r", offset=26, shape=count)
    places = np.memmap(index, "<i8", mode="r", offset=26 + 4 * count, shape=count)
    parts = (slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE))
    return max(int((places[part] + lengths[part].astype(np.int64) * size).max()) for part in parts)

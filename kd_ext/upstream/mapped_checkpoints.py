"""Reading a checkpoint of which only a part is wanted."""

import contextlib
import functools
import zipfile
from typing import Iterator

import torch

from kd_ext.files.safe_loading import HAS_SAFE_GLOBALS


@contextlib.contextmanager
def mapped_checkpoints() -> Iterator[None]:
    """Inside, ``load_checkpoint_to_cpu`` maps a file into memory (fairseq 0.12.2, torch >= 2.6).

    fairseq reads all of a file, two thirds of which are the optimizer's, into memory that the allocator keeps.
    Of a mapped file only what is used takes memory, and it is given back with the last of its tensors. None of
    them must be kept: a file that is written over changes them.
    """
    original = torch.load
    if not HAS_SAFE_GLOBALS:  # there it is not torch that reads
        yield
        return

    @functools.wraps(original)
    def load(file, *args, **kwargs):
        path = getattr(file, "name", file)
        return original(path, *args, mmap=True, **kwargs) if _is_mappable(path) else original(file, *args, **kwargs)

    torch.load = load
    try:
        yield
    finally:
        torch.load = original


def _is_mappable(path: str) -> bool:
    """Whether tensors are in a file as they are in memory: an archive, which torch < 1.6 did not write, as it is."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())

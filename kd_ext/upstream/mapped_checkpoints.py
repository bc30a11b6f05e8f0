"""Checkpoints of which only a part is wanted."""

import contextlib
import functools
import inspect
import zipfile
from typing import Iterator

import torch


@contextlib.contextmanager
def mapped_checkpoints() -> Iterator[None]:
    """Inside, fairseq's ``load_checkpoint_to_cpu`` maps a file into memory (torch >= 2.1).

    fairseq (0.12.2) reads all of it: two thirds are the optimizer's, and what the allocator was asked for in pieces
    of megabytes it does not give back. Of a mapped file only what is used takes memory, and all of it is given back
    with the last tensor. The tensors must not be kept: they end with the file, should it be overwritten in place.
    """
    original = torch.load
    if "mmap" not in inspect.signature(original).parameters:
        yield
        return

    @functools.wraps(original)
    def load(file, *args, **kwargs):
        path = getattr(file, "name", file)
        if not zipfile.is_zipfile(path):  # as torch < 1.6 wrote it
            return original(file, *args, **kwargs)
        return original(path, *args, mmap=True, **kwargs)

    torch.load = load
    try:
        yield
    finally:
        torch.load = original

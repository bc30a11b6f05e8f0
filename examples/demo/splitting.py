"""Training, validation and test text, with no English string in two of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Dict, List

from catalogues import Pair, read_pairs, write_pairs

SPLITS = ("train", "valid", "test")
PERCENT = {"test": 3, "valid": 2}


def split_of(english: str) -> str:
    """The split of every pair with this English side, in whatever language and letter case.

    The same string is translated into many languages: split by pairs, its translation into Spanish would
    teach a model the test's translation from German.
    """
    digest = hashlib.sha256(english.casefold().encode("utf-8")).digest()
    place = int.from_bytes(digest[:8], "big") % 100
    if place < PERCENT["test"]:
        return "test"
    return "valid" if place < PERCENT["test"] + PERCENT["valid"] else "train"


def split(pairs: Path, folder: Path) -> None:
    """Write ``train.tsv``, ``valid.tsv`` and ``test.tsv``."""
    parts: Dict[str, List[Pair]] = {name: [] for name in SPLITS}
    for pair in read_pairs(pairs):
        parts[split_of(pair.english)].append(pair)
    for name, part in parts.items():
        write_pairs(folder / f"{name}.tsv", part)

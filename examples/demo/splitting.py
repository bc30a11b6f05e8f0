"""Training, validation and test text, with no English string in two of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Dict, List, Optional

from catalogues import Pair, read_pairs, write_pairs

SPLITS = ("train", "valid", "test")
PERCENT = {"test": 3, "valid": 2}


def split_of(english: str, percent: Dict[str, int] = PERCENT) -> str:
    """The split of every pair with this English side, in whatever language and letter case.

    The same string is translated into many languages: split by pairs, its translation into Spanish would
    teach a model the test's translation from German.
    """
    place = _hash(english) % 100
    if place < percent["test"]:
        return "test"
    return "valid" if place < percent["test"] + percent["valid"] else "train"


def split(
    pairs: Path, folder: Path, percent: Dict[str, int] = PERCENT, limits: Optional[Dict[str, int]] = None
) -> None:
    """Write ``train.tsv``, ``valid.tsv`` and ``test.tsv``.

    Args:
        pairs: the file of all
        folder: to write to
        percent: of the English strings, what goes into ``test`` and ``valid``
        limits: the most pairs of a language in a split, where there is one
    """
    parts: Dict[str, Dict[str, List[Pair]]] = {name: {} for name in SPLITS}
    for pair in read_pairs(pairs):
        parts[split_of(pair.english, percent)].setdefault(pair.language, []).append(pair)
    for name, languages in parts.items():
        limit = (limits or {}).get(name)
        kept = languages.values() if limit is None else (_some(those, limit) for those in languages.values())
        write_pairs(folder / f"{name}.tsv", [pair for those in kept for pair in those])


def _some(pairs: List[Pair], limit: int) -> List[Pair]:
    """As many as that, chosen by what they say, in their order."""
    chosen = set(sorted(pairs, key=lambda pair: _hash("\t".join(pair)))[:limit])
    return [pair for pair in pairs if pair in chosen]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.casefold().encode("utf-8")).digest()[:8], "big")

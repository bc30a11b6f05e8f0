"""The text of the studies: real translations from pinned packages, which are fetched and never kept here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import recipes
import run as demo
from catalogues import extract
from cleaning import MAX_CHARACTERS
from fetch import fetch
from pieces import MAX_PIECES, VOCABULARY, cut
from running import Commands
from splitting import split
from steps import Step

WHEELS = Path(__file__).with_name("wheels.txt")


class Corpus(NamedTuple):
    """Text to translate into English.

    Attributes:
        languages: that it is in
        percent: of the English strings, what goes into ``test`` and ``valid``
        limits: the most pairs of a language in each split
        alone: whether each language is prepared by itself, too
    """

    languages: Tuple[str, ...]
    percent: Dict[str, int]
    limits: Dict[str, int]
    alone: bool = False


CORPORA = {
    "pair": Corpus(("de",), {"test": 3, "valid": 1}, {}),
    "languages": Corpus(
        ("as", "bn", "de", "es", "gu", "hi", "kn", "pa", "ta", "te"),
        {"test": 5, "valid": 1},
        {"train": 30000, "test": 500},
        alone=True,
    ),
}


def wheels(folder: Path) -> Step:
    """The packages, in ``folder/wheels``."""
    settings = {"wheels": WHEELS.read_text(encoding="utf-8")}
    return Step("wheels", settings, partial(fetch, log=folder / "wheels.log", wheels=WHEELS), resumes=True)


def steps(corpus: Corpus, commands: Commands, packages: Path) -> List[Step]:
    """From the packages to binarized text, in order."""
    alone = corpus.languages if corpus.alone else ()
    out = commands.out
    pairs = {"wheels": WHEELS.read_text(encoding="utf-8"), "languages": corpus.languages, "most": MAX_CHARACTERS}
    pieces = {"vocabulary": VOCABULARY, "max_pieces": MAX_PIECES, "languages": corpus.languages, "alone": alone}
    done = [
        Step("pairs", pairs, partial(extract, packages, languages=corpus.languages)),
        Step(
            "text",
            {"percent": corpus.percent, "limits": corpus.limits},
            partial(split, out / "pairs" / "pairs.tsv", percent=corpus.percent, limits=corpus.limits),
            after=("pairs",),
        ),
        Step("pieces", pieces, partial(cut, out / "text", alone, languages=corpus.languages), after=("text",)),
    ]
    for language in (None, *alone):
        name = recipes.data_folder(language)
        done.append(
            Step(
                name,
                {"command": recipes.preprocess(language, name)},
                partial(demo.preprocess, commands, language),
                after=("pieces", *([recipes.DATA] if language else [])),
            )
        )
    return done

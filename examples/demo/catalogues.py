"""Message catalogues inside a wheel, as pairs of a foreign and an English string; no code of it is run."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple, Tuple

import polib
from cleaning import clean, is_useful
from tqdm import tqdm

LANGUAGES = ("bn", "de", "es", "hi", "mr", "ta")
_LANGUAGE = f"({'|'.join(LANGUAGES)})"
_PO = re.compile(rf".*/locale/{_LANGUAGE}(?:_IN)?/LC_MESSAGES/\w+\.po")
_JSON = re.compile(rf"(.*/translations/(?:\w+\.)?){_LANGUAGE}\.json")


class Pair(NamedTuple):
    """One line of the corpus."""

    language: str
    foreign: str
    english: str


def extract(wheels: Path, folder: Path) -> None:
    """Write the pairs of every wheel, cleaned, each once, to ``pairs.tsv``."""
    found = set()
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if _PO.fullmatch(name) or _JSON.fullmatch(name))
            for name in tqdm(names, desc=wheel.name.split("-")[0], unit="file", leave=False, disable=None):
                for language, foreign, english in read_catalogue(archive, name):
                    pair = Pair(language, clean(foreign), clean(english))
                    if is_useful(pair.foreign, pair.english):
                        found.add(pair)
    write_pairs(folder / "pairs.tsv", sorted(found))


def read_catalogue(archive: zipfile.ZipFile, name: str) -> Iterator[Pair]:
    """The translated strings of one file of `archive`, as they stand there."""
    po = _PO.fullmatch(name)
    if po:
        for entry in polib.pofile(archive.read(name).decode("utf-8")):
            if entry.obsolete or entry.fuzzy:
                continue
            if entry.msgid_plural:
                # the last form is the general one
                yield Pair(po[1], entry.msgstr_plural[max(entry.msgstr_plural)], entry.msgid_plural)
            else:
                yield Pair(po[1], entry.msgstr, entry.msgid)
        return
    translations = _JSON.fullmatch(name)
    assert translations, name
    folder, language = translations.groups()
    try:
        english = dict(_strings(json.loads(archive.read(f"{folder}en.json"))))
    except KeyError:  # a few folders have no English
        return
    for key, foreign in _strings(json.loads(archive.read(name))):
        if key in english:
            yield Pair(language, foreign, english[key])


def _strings(tree: Any, key: Tuple[str, ...] = ()) -> Iterator[Tuple[Tuple[str, ...], str]]:
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from _strings(branch, (*key, name))
    elif isinstance(tree, str):
        yield key, tree


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """One pair a line; cleaned text has neither tabs nor line ends."""
    path.write_text("".join("\t".join(pair) + "\n" for pair in pairs), encoding="utf-8")


def read_pairs(path: Path) -> Iterator[Pair]:
    """What :func:`write_pairs` wrote."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield Pair(*line.rstrip("\n").split("\t"))

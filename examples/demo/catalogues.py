"""Message catalogues inside a wheel, as pairs of a foreign and an English string; no code of it is run."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Collection, Dict, Iterable, Iterator, Match, NamedTuple, Optional, Tuple

import polib
from cleaning import clean, is_useful
from tqdm import tqdm

LANGUAGES = ("bn", "de", "es", "hi", "mr", "ta")
# what a catalogue of a language may be called beside its name
_REGIONS = ("", "_IN", "_BD", "_DE", "_ES")
_GETTEXT = re.compile(r".*/(?P<language>\w+)/LC_MESSAGES/[^/]+\.(po|mo)")
# the English strings are in a file of their own, which is named alike
_JSON = (
    re.compile(r"(?P<before>.*/translations/(?:.*/)?(?:\w+\.)?)(?P<language>\w+)(?P<after>(?:-[0-9a-f]{32})?\.json)"),
    re.compile(r"(?P<before>.*/locale/)(?P<language>\w+)(?P<after>/LC_MESSAGES/[^/]+\.json)"),
)
_IDENTIFIER = re.compile(r"[\w.]*_[\w.]*")
_DEFAULT = re.compile(r'Default: "(.*)"', re.DOTALL)


class Pair(NamedTuple):
    """One line of the corpus."""

    language: str
    foreign: str
    english: str


def extract(wheels: Path, folder: Path, languages: Collection[str] = LANGUAGES) -> None:
    """Write the pairs of every wheel, cleaned, each once, to ``pairs.tsv``."""
    found = set()
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = catalogues(archive.namelist(), languages)
            for name in tqdm(sorted(names), desc=wheel.name.split("-")[0], unit="file", leave=False, disable=None):
                for foreign, english in read_catalogue(archive, name):
                    pair = Pair(names[name], clean(foreign), clean(english))
                    if is_useful(pair.foreign, pair.english):
                        found.add(pair)
    write_pairs(folder / "pairs.tsv", sorted(found))


def catalogues(names: Collection[str], languages: Collection[str]) -> Dict[str, str]:
    """The languages of those of a wheel's files that are catalogues of one of `languages`, by the file's name."""
    of = {language + region: language for language in languages for region in _REGIONS}
    present, found = set(names), {}
    for name in names:
        for pattern in (_GETTEXT, *_JSON):
            match = pattern.fullmatch(name)
            # a compiled catalogue is read where its source is not there
            if match and match["language"] in of and not (name.endswith(".mo") and name[:-2] + "po" in present):
                found[name] = of[match["language"]]
    return found


def read_catalogue(archive: zipfile.ZipFile, name: str) -> Iterator[Tuple[str, str]]:
    """The translated strings of one file of `archive`, and the English ones, as they stand there."""
    if _GETTEXT.fullmatch(name):
        yield from _gettext(archive.read(name), name.endswith(".mo"))
        return
    (english,) = (_english(archive.namelist(), match) for match in (p.fullmatch(name) for p in _JSON) if match)
    if english is None:  # a few folders have no English
        return
    originals = dict(_strings(json.loads(archive.read(english))))
    for key, foreign in _strings(json.loads(archive.read(name))):
        if key in originals:
            yield foreign, originals[key]


def _gettext(content: bytes, compiled: bool) -> Iterator[Tuple[str, str]]:
    with tempfile.NamedTemporaryFile() as file:  # polib reads compiled ones from files alone
        file.write(content)
        file.flush()
        entries = (polib.mofile if compiled else polib.pofile)(file.name, encoding="utf-8")
    for entry in entries.translated_entries():
        # where messages are called by a name, the English one is in a comment
        default = _DEFAULT.search(entry.comment)
        english = default[1] if default else entry.msgid_plural or entry.msgid
        if not _IDENTIFIER.fullmatch(english):
            # the last form is the general one
            yield entry.msgstr_plural[max(entry.msgstr_plural)] if entry.msgid_plural else entry.msgstr, english


def _english(names: Collection[str], match: Match[str]) -> Optional[str]:
    after = match["after"]
    if after.startswith("-"):  # a hash of what is in the file
        pattern = re.compile(re.escape(match["before"]) + r"en-[0-9a-f]{32}\.json")
        return next((name for name in names if pattern.fullmatch(name)), None)
    name = f"{match['before']}en{after}"
    return name if name in names else None


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

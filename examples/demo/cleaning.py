"""Which strings of a user interface are text to learn translation from."""

from __future__ import annotations

import re

MAX_CHARACTERS = 200

_PLACEHOLDER = re.compile(r"%\(\w*\)\w|%[a-z]|\{[^}]*\}|\[%.*?%\]")
_HTML = re.compile(r"</?[a-zA-Z]|&#?\w+;")


def clean(text: str) -> str:
    """`text` on one line, with single spaces."""
    return " ".join(text.split())


def is_useful(foreign: str, english: str) -> bool:
    """Whether two cleaned strings are a translation of words, short enough and without markup."""
    if foreign.casefold() == english.casefold():
        return False
    return all(
        len(text) <= MAX_CHARACTERS
        and not _HTML.search(text)
        and any(character.isalpha() for character in _PLACEHOLDER.sub("", text))
        for text in (foreign, english)
    )

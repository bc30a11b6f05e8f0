"""The documentation: the README and the pages of docs/, and the commands in them."""

import re
from pathlib import Path
from typing import List

from commands import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> List[str]:
    """The fenced blocks of a page that name no language: what is typed in a shell, or printed by it."""
    return re.findall(r"^```\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def lines_of(block: str) -> List[str]:
    """The commands of a block, one a line, without what continues a line."""
    return re.sub(r"\\\n\s*", "", block).splitlines()


def command(page: Path, *words: str) -> str:
    """The one command of a page that has all these `words`, on one line."""
    (found,) = [line for block in blocks(page) for line in lines_of(block) if all(word in line for word in words)]
    return found

"""The documentation: the README and the pages of docs/, and the commands in them."""

import os
import re
import subprocess
from pathlib import Path
from typing import List

from commands import ENVIRONMENT, ROOT, Result, script

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> List[str]:
    """The fenced blocks of a page that name no language: what is typed in a shell, or printed by it."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in found if not language]


def lines_of(block: str) -> List[str]:
    """The commands of a block, one a line, without what continues a line."""
    return re.sub(r"\\\n\s*", "", block).splitlines()


def command(page: Path, *words: str) -> str:
    """The one command of a page that has all these `words`, on one line."""
    lines = [line for block in blocks(page.read_text()) for line in lines_of(block)]
    (found,) = [line for line in lines if all(word in line for word in words)]
    return found


def path_of_the_readme() -> List[str]:
    """The blocks that lead to a translated sentence.

    Without those that clone and install: the tests are run in a checkout by an environment that has it.
    """
    text = README.read_text().split("\n## From an empty folder to a translated sentence\n")[1].split("\n## ")[0]
    return [block for block in blocks(text) if "git clone" not in block and "pip install" not in block]


def paste(folder: Path, typed: List[str]) -> Result:
    """Give blocks to a shell in `folder`, one after the other, up to the first that fails."""
    environment = {**ENVIRONMENT, "PATH": f"{Path(script('python')).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", "".join(typed)],
        cwd=str(folder),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return Result(done.returncode, done.stdout)


def assert_translated(output: str) -> None:
    """The path's sentence, by a model that has learned for seconds: at most one word of it may be wrong."""
    (hypothesis,) = re.findall(r"^H-0\t\S+\t(.*)$", output, re.MULTILINE)
    right = [word == reference for word, reference in zip(hypothesis.split(), ["three", "five", "one", "nine"])]
    assert len(hypothesis.split()) == 4, hypothesis
    assert sum(right) >= 3, hypothesis

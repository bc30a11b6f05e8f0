"""The wheels that the text comes from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from steps import DemoError

WHEELS = Path(__file__).with_name("wheels.txt")


def fetch(folder: Path, log: Path, wheels: Path = WHEELS) -> None:
    """Download the pinned wheels, checked against their hashes; pip shows its progress bar on a terminal.

    Raises:
        DemoError: one line
    """
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries", "2"]
    # the wheels are read, not installed: the Python that they ask for does not matter
    command += ["--ignore-requires-python", "--require-hashes", "-r", str(wheels), "-d", str(folder)]
    with log.open("a", encoding="utf-8") as file:
        start = file.tell()
        if sys.stdout.isatty():
            print()  # pip's lines and bars come below the name of the step
        output = None if sys.stdout.isatty() else file
        status = subprocess.run(command, stdout=output, stderr=file).returncode
    if status == 0:
        return
    with log.open(encoding="utf-8") as file:
        file.seek(start)
        said = file.read()
    if "connection broken" in said:
        raise DemoError(f"fetch: the package registry cannot be reached; is there a network? (log: {log})")
    errors = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()[-1:] or ["?"]
    raise DemoError(f"fetch: pip could not download {wheels.name}: {errors[0]} (log: {log})")

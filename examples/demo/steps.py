"""A step's result is a folder, which has its final name only once it is complete."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

SETTINGS = "settings.json"


class DemoError(Exception):
    """What the user reads in place of a traceback."""


def exit_status(work: Callable[[], None]) -> int:
    """Do `work`; 0, 1 after the message of a :class:`DemoError`, 130 after Ctrl-C."""
    try:
        work()
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to carry on", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class Step:
    """One folder of the demo's results, and how it is made.

    Args:
        name: the folder's name
        settings: all that the result depends on, beside the steps before it
        work: fills the folder it is given
        after: the steps whose results this one reads
        resumes: `work` carries on with what an interrupted `work` left in the folder
    """

    name: str
    settings: Dict[str, Any]
    work: Callable[[Path], None]
    after: Tuple[str, ...] = ()
    resumes: bool = False


def run_step(out: Path, step: Step) -> bool:
    """Do `step` in ``out/<name>.partial``, then rename it to ``out/<name>``.

    Returns:
        False if there was nothing to do: the folder is there, made with these settings from these inputs
    """
    final, partial = out / step.name, out / f"{step.name}.partial"
    before = {name: _fingerprint(out / name) for name in step.after}
    settings = json.dumps({"settings": step.settings, "after": before}, indent=1)
    if _settings(final) == settings:
        return False
    _discard(final)
    if not (step.resumes and _settings(partial) == settings):
        _discard(partial)
        partial.mkdir(parents=True)
        (partial / SETTINGS).write_text(settings, encoding="utf-8")
    step.work(partial)
    partial.rename(final)
    return True


def _settings(folder: Path) -> str:
    path = folder / SETTINGS
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _fingerprint(folder: Path) -> str:
    # the settings name the inputs' fingerprints: a change anywhere upstream reaches every step after it
    return hashlib.sha256(_settings(folder).encode()).hexdigest()


def _discard(folder: Path) -> None:
    if folder.exists():
        # first what makes the folder count: a folder half deleted must not pass for a result
        (folder / SETTINGS).unlink(missing_ok=True)
        shutil.rmtree(folder)

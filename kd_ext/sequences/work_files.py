"""What is done of a long piece of work, batch by batch: a run that was killed goes on from there."""

import glob
import json
import os
from typing import Any, Dict, Iterator, Set, Tuple

from kd_ext.errors import ConfigError
from kd_ext.files.folder_lock import NAME, hold
from kd_ext.files.writing import PART, written_whole

MANIFEST = "manifest.json"


def take(folder: str) -> None:
    """Make a folder for work, or take one where work was begun, for this process alone.

    Raises:
        ConfigError: something else is in it, or another process works there
    """
    try:
        os.makedirs(folder, exist_ok=True)
        there = set(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"--destdir: {folder} cannot be made: {error.strerror}; name another folder") from error
    if MANIFEST not in there and there - {NAME, MANIFEST + PART}:
        raise ConfigError(f"--destdir: {folder} is there, and this command did not make it; name another folder")
    hold(folder, "--destdir")


def check_same(folder: str, manifest: Dict[str, Any], done: str) -> None:
    """See that a folder is of the work that `manifest` tells from other work.

    Args:
        done: what was done to it, for the message

    Raises:
        ConfigError: it is of other work, or of none
    """
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            found = dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--destdir: {folder} is there, and this command did not make it; name another folder"
        ) from error
    for key in {**manifest, **found}:
        if found.get(key) != manifest.get(key):
            raise ConfigError(
                f"{folder}: was {done} with {key} {found.get(key)}, and this is {manifest.get(key)}; give that, remove "
                "the folder, or name another --destdir"
            )


class WorkFiles:
    """A folder of lines, one a batch, each in one piece or not at all; every process has a file of its own.

    Args:
        folder: one that :func:`take` has taken
        manifest: what the work is; it must be what was begun there

    Raises:
        ConfigError: other work was begun there
    """

    def __init__(self, folder: str, manifest: Dict[str, Any]) -> None:
        self.folder = folder
        path = os.path.join(folder, MANIFEST)
        if os.path.exists(path):
            check_same(folder, manifest, "begun")
        else:
            with written_whole(path) as writer:
                writer.write(json.dumps(manifest, indent=1).encode())

    @classmethod
    def of(cls, folder: str) -> "WorkFiles":
        """What another process has begun."""
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            return cls(folder, json.load(file))

    def writer(self) -> "_Writer":
        """Of a file of its own."""
        number = 0
        while True:
            path = os.path.join(self.folder, f"work-{number}.jsonl")
            try:
                return _Writer(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            except FileExistsError:
                number += 1

    def lines(self) -> Iterator[Tuple[int, Any]]:
        """Each batch that is done, once: its number, and what was written of it."""
        seen: Set[int] = set()
        for path in sorted(glob.glob(os.path.join(glob.escape(self.folder), "work-*.jsonl"))):
            with open(path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):  # cut off by a kill
                        break
                    number, content = json.loads(line)
                    if number not in seen:
                        seen.add(number)
                        yield number, content


class _Writer:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, batch: int, content: Any) -> None:
        """Add a batch's line.

        Raises:
            ConfigError: the system refuses to write it
        """
        line = json.dumps([batch, content], separators=(",", ":")).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise ConfigError(
                f"--destdir: cannot be written: {error.strerror}; make room, and run the same command to go on"
            ) from error

"""Folders that appear whole or not at all, and take the place of nothing but an older one of their kind."""

import contextlib
import os
import shutil
from typing import Callable, Iterator

from kd_ext.errors import ConfigError
from kd_ext.files.writing import PART


def check_folder(path: str, is_ours: Callable[[str], bool], writer: str) -> None:
    """See that a folder can be written: there is none, or an empty one, or an older one of the same kind.

    Args:
        path: that was asked for
        is_ours: of the name of a file in it
        writer: whose files are such

    Raises:
        ConfigError: something else is there
    """
    if os.path.isdir(path):
        others = sorted(name for name in os.listdir(path) if not is_ours(name))
        if others:
            raise ConfigError(
                f"{path}: is there, with {others[0]} in it, which {writer} does not write; name another folder"
            )
    elif os.path.lexists(path):
        raise ConfigError(f"{path}: is there, and no folder; name another one to write")
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise ConfigError(f"{path}: no folder {parent}; make it first")


@contextlib.contextmanager
def folder_written_whole(path: str) -> Iterator[str]:
    """A folder that takes the place of `path` at the end of the block; the block makes it, under the name given.

    Raises:
        ConfigError: the system refuses to write it; nothing of it is left
    """
    target = os.path.realpath(path)
    part = f"{target}.{os.getpid()}{PART}"
    try:
        yield part
        _put(part, target)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put(part: str, path: str) -> None:
    """Give a folder its name; an older one steps aside first, as no folder can take the place of a full one."""
    old = f"{part}.old"
    if os.path.isdir(path) and os.listdir(path):
        os.rename(path, old)
    os.rename(part, path)
    shutil.rmtree(old, ignore_errors=True)

"""Folders that appear whole or not at all, and take the place of nothing but an older one of this command's."""

import contextlib
import os
import shutil
from typing import Any, Callable, Collection, Dict, Iterator

from kd_ext.errors import ConfigError
from kd_ext.exporting.brought_json import read_config
from kd_ext.files.writing import PART


def check_folder(path: str, written: Callable[[Dict[str, Any]], Collection[str]]) -> None:
    """See that a folder can be written: there is none, or an empty one, or an older one of the same format.

    Args:
        path: that was asked for
        written: of a folder's ``config.json``, the names of the files that this command wrote with it; none, if that
            is not of this command

    Raises:
        ConfigError: something else is there
    """
    target = os.path.abspath(path)  # "" is the folder one is in, which is not to be replaced; out/ may be a file
    if os.path.isdir(target):
        others = sorted(set(os.listdir(target)).difference(written(_config_in(target))))
        if others:
            raise ConfigError(
                f"{path}: is there, with {others[0]} in it, which is not known to be of this command; name another "
                "folder, or remove this one"
            )
    elif os.path.lexists(target):
        raise ConfigError(f"{path}: is there, and no folder; name another one to write")
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        raise ConfigError(f"{path}: no folder {parent}; make it first")


def _config_in(path: str) -> Dict[str, Any]:
    try:
        return read_config(path)
    except ConfigError:  # this command writes none that cannot be read
        return {}


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
    steps_aside = os.path.isdir(path) and os.listdir(path)
    if steps_aside:
        os.rename(path, old)
    try:
        os.rename(part, path)
    except BaseException:
        if steps_aside:
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)

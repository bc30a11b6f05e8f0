"""Writing files that are at each moment whole: the old one or the new one."""

import contextlib
import os
import stat
from typing import Any, BinaryIO, Callable, Iterator, Optional, Sequence

from kd_ext.errors import ConfigError

PART = ".tmp"


@contextlib.contextmanager
def written_whole(path: str, part: Optional[str] = None) -> Iterator["_Writer"]:
    """A file that takes the place of `path`, in one step, at the end of the block.

    Until then it lies beside, under a name of its own: killed at any moment, or out of room, `path` is what it was.
    What a kill leaves behind is overwritten by the next attempt. The content is on the disk before it gets the
    name, so that a loss of power cannot part them.

    Args:
        part: where it lies until then, under a name that nothing has; None: under that of `path` with ``.tmp``

    Raises:
        ConfigError: the system refuses to write it; nothing of it is left
    """
    try:
        file = open(part or path + PART, "xb" if part else "wb")  # noqa: SIM115  closed below
    except OSError as error:
        raise _refused(path, error) from error
    try:
        with file:
            writer = _Writer(file)
            yield writer
            if writer.error is not None:
                raise writer.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        refusal = _refusal(error)
        if refusal is not None:
            raise _refused(path, refusal) from error
        raise


def make_folder(path: str, flag: str) -> None:
    """Make a folder, with those that it lies in; one that is there stays.

    Args:
        flag: that named it, for the message

    Raises:
        ConfigError: it cannot be made
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be made: {error.strerror}; name another folder") from error


def check_output(path: str, inputs: Sequence[str], check_same_kind: Callable[[str], Any]) -> str:
    """See that a command's output destroys nothing: it takes the place of no file but an older output.

    Args:
        path: that was asked for
        inputs: what the command reads
        check_same_kind: raises ConfigError for a file that is no output of such a command

    Returns:
        the path to write: of a link what it points to

    Raises:
        ConfigError: it is read, is no regular file or one of another kind, or its folder does not exist, or its name is
            a folder's
    """
    if path.endswith(os.sep):
        raise ConfigError(f"{path}: a folder's name; name the file to write")
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise ConfigError(f"{path}: no folder {folder}; make it first")
    if not os.path.lexists(target):
        return target
    for name in inputs:
        if os.path.exists(name) and os.path.samefile(name, target):
            raise ConfigError(f"{path}: this command reads it, and would replace it; name another file to write")
    if not stat.S_ISREG(os.stat(target).st_mode):
        raise ConfigError(f"{path}: is there, and no regular file; name another file to write")
    try:
        check_same_kind(target)
    except ConfigError as error:
        raise ConfigError(f"{path}: is there, and not what this command writes; name another file to write") from error
    return target


class _Writer:
    """Keeps the first error for later: torch < 2 answers a write that fails by ending the process."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.name = file, file.name
        self.error: Optional[OSError] = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """At the end of the block."""


def _refused(path: str, refusal: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be written: {refusal.strerror or refusal}")


def _refusal(error: Optional[BaseException]) -> Optional[OSError]:
    """What the system said: torch answers a write that fails with a RuntimeError of its own."""
    while isinstance(error, RuntimeError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) else None

"""A folder that one process holds, until it ends in whatever way."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from typing import Dict

from kd_ext.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = ".kd_ext.lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
# the one folder that this process holds, and the open file that says so
_held: Dict[str, int] = {}


def hold(folder: str, flag: str) -> None:
    """Take a folder for this process, at once or not at all; a folder that it held before is let go.

    The lock is the system's, on a file in the folder: it ends with the process, and its children do not have it. It
    also keeps off other machines where a network file system has locks. Where there are none the log says so.

    Args:
        folder: that is there
        flag: that named it, for the message

    Raises:
        ConfigError: another process holds it
    """
    real = os.path.realpath(folder)
    if real in _held:  # to close the file once more would end the lock
        return
    try:
        descriptor = os.open(os.path.join(real, NAME), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        return _warn(folder, flag, error)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno not in _HELD_BY_ANOTHER:
            return _warn(folder, flag, error)
        raise ConfigError(
            f"{flag} {folder}: a run is at work there{f' ({holder})' if holder else ''}; wait for its end, or name "
            "another folder"
        ) from None
    while _held:
        os.close(_held.popitem()[1])
    _held[real] = descriptor
    with contextlib.suppress(OSError):  # a full disk; the name is only for a message
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return None


def _warn(folder: str, flag: str, error: OSError) -> None:
    logger.warning(
        "%s %s: no lock can be had there (%s): nothing keeps a second run from the same folder",
        *(flag, folder, error.strerror),
    )

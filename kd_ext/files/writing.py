"""Writing files that are at each moment whole: the old one or the new one."""

import contextlib
import os
from typing import Any, BinaryIO, Iterator, Optional

from kd_ext.errors import ConfigError

PART = ".tmp"


@contextlib.contextmanager
def written_whole(path: str) -> Iterator["_Writer"]:
    """A file that takes the place of `path`, in one step, at the end of the block.

    Until then it lies beside, under a name of its own: killed at any moment, or out of room, `path` is what it was.
    What a kill leaves behind is overwritten by the next attempt. The content is on the disk before it gets the
    name, so that a loss of power cannot part them.

    Raises:
        ConfigError: the system refuses to write it; nothing of it is left
    """
    part = path + PART
    try:
        with open(part, "wb") as file:
            writer = _Writer(file)
            yield writer
            if writer.error is not None:
                raise writer.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        refusal = _refusal(error)
        if refusal is not None:
            raise ConfigError(f"{path}: cannot be written: {refusal.strerror or refusal}") from error
        raise


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


def _refusal(error: Optional[BaseException]) -> Optional[OSError]:
    """What the system said: torch answers a write that fails with an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error

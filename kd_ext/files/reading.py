"""Reading files that torch wrote: whatever is wrong with one is an error of one line."""

import contextlib
import re
import zipfile
from typing import Iterator

from kd_ext.errors import ConfigError


@contextlib.contextmanager
def explained(path: str, expected: str) -> Iterator[None]:
    """Check the sums in `path`, then explain any error of what is run inside, which reads that file.

    torch does not check them: a weight with a flipped bit would be loaded.

    Args:
        expected: what the file should be, for the messages

    Raises:
        ConfigError: the file is damaged, is no such file, or refers to what could run code
    """
    try:
        changed = _changed_part(path)
        if changed is not None:
            raise ValueError(f"{changed} is not as it was written")
        yield
    except (ConfigError, FileNotFoundError, MemoryError):
        raise
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: a folder; name a {expected} in it") from error
    except PermissionError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # the bytes of a file can make torch raise anything
        if "allocate memory" in str(error):  # torch has no MemoryError
            raise
        raise _explanation(path, expected, error) from error


def _explanation(path: str, expected: str, error: Exception) -> ConfigError:
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        reason = f"refused, it refers to {foreign[1]}, which no {expected} does: loading it could run code"
    else:
        cause = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        reason = f"damaged, cut short, or not a {expected} ({cause})"
    return ConfigError(f"{path}: {reason}")


def _changed_part(path: str):
    """The first part of an archive whose checksum is wrong; None for a sound one, and for what is no archive."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()

"""Reading files that torch wrote: whatever is wrong with one is an error of one line."""

import contextlib
import errno
import os
import pickle
import re
import stat
import tarfile
import zipfile
from typing import Iterator, Optional

from kd_ext.errors import ConfigError

MOST_TIMES = 20  # that an archive unfolds to its own size; torch compresses nothing
# torch < 1.6 and its option write this number first, then pickles
_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_OWN_PROTOCOL = 2  # torch.save's
_FOLDER = 0x10  # of MS-DOS, in an archive's attributes
# by which torch advises to load a file unsafely
_ADVICE = re.compile(r"weights_only|add_safe_globals|arbitrary code", re.IGNORECASE)


@contextlib.contextmanager
def explained(path: str, expected: str) -> Iterator[None]:
    """Check the form and the sums of `path`, then explain any error of what is run inside, which reads that file.

    torch does not check sums: a weight with a flipped bit would be loaded.

    Args:
        expected: what the file should be, for the messages

    Raises:
        ConfigError: the file is damaged, is no such file, cannot be read, or refers to what could run code
    """
    if os.path.isdir(path):
        raise ConfigError(f"{path}: a folder; name a {expected} in it")
    try:
        refusal = _refusal(path)
        if refusal is not None:
            raise ConfigError(f"{path}: refused, it is {refusal}, and no {expected} is")
        changed = _changed_part(path)
        if changed is not None:
            raise ValueError(f"{changed} is not as it was written")
        yield
    except (ConfigError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # the bytes of a file can make torch raise anything
        # what the system says is no damage, but for a place in the file that cannot be: that is in its bytes
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        if "allocate memory" in str(error):  # torch has no MemoryError
            raise
        raise _explanation(path, expected, error) from error


def require_regular(path: str) -> None:
    """See that `path`, if there is such a thing, is a file that can be read to its end: of a pipe none may come.

    Raises:
        ConfigError: it is a folder, a pipe, a device, ...
        OSError: the system does not say what it is
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file, but a pipe, a socket or a device"
        raise ConfigError(f"{path}: {what}; name a file")


def _refusal(path: str) -> Optional[str]:
    """What the file is, if that is nothing that torch would read safely, or within bounds."""
    require_regular(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unfolded, size = sum(part.file_size for part in archive.infolist()), os.path.getsize(path)
        if unfolded > MOST_TIMES * size:
            return f"an archive of {size:,} bytes that unfolds to {unfolded:,}"
        return None
    with open(path, "rb") as file:
        begin = file.read(64)
    if _MAGIC in begin or begin[:2] == b"PK":  # an archive without its end is damaged
        return None
    if begin[:1] == b"\x80":
        return "a bare pickle, which could run code"
    if tarfile.is_tarfile(path):
        return "a tar archive, which could run code"
    raise ValueError("it does not begin as one")


def _explanation(path: str, expected: str, error: Exception) -> ConfigError:
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        reason = f"refused, it refers to {foreign[1]}, which no {expected} does: loading it could run code"
    else:
        said = (str(error).strip().splitlines() or [""])[0]
        protocol = _protocol(path) if isinstance(error, pickle.UnpicklingError) else 0
        if protocol > _OWN_PROTOCOL:
            said = (
                f"saved with pickle protocol {protocol}, which torch reads only where it may run code; where you trust "
                "it, save it again: torch.save(torch.load(FILE, weights_only=False), OTHER)"
            )
            return ConfigError(f"{path}: {said}")
        if _ADVICE.search(said):
            said = "torch finds in it what is not in files of tensors"
        reason = f"damaged, cut short, or not a {expected} ({type(error).__name__}: {said})"
    return ConfigError(f"{path}: {reason}")


def _protocol(path: str) -> int:
    """Of the pickle in a whole archive; 0 where there is none."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not found:
            return 0
        with archive.open(found[0]) as file:
            begin = file.read(2)
    return begin[1] if begin[:1] == b"\x80" and len(begin) == 2 else 0


def _changed_part(path: str) -> Optional[str]:
    """The first part of an archive that torch would not read as it was written; None: all is well, or no archive.

    Beside wrong checksums that is a part that is marked as a folder, for which torch gives what happened to be in
    memory, and one of two of the same name, of which the checksums of one alone would be seen.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = set()
        for part in archive.infolist():
            if part.filename in names or (part.external_attr & _FOLDER and not part.is_dir()):
                return part.filename
            names.add(part.filename)
        return archive.testzip()

"""The files of a teacher cache: plain arrays that are mapped into memory, and a manifest of what they belong to."""

import contextlib
import errno
import fcntl
import json
import os
import zlib
from typing import Any, Dict, Iterator, NamedTuple, Sequence, Set, Tuple

import numpy as np

from kd_ext.errors import ConfigError
from kd_ext.files.folder_lock import NAME as LOCK
from kd_ext.files.reading import require_regular
from kd_ext.files.writing import PART, written_whole

FLAG = "--teacher-cache-dir"
_MANIFEST = "manifest.json"
# there from before the first array until the manifest is: it gets the manifest's name, in one step
_UNFINISHED_MANIFEST = _MANIFEST + PART
_LARGEST_MANIFEST = 100_000  # bytes


class _Arrays(NamedTuple):
    words: np.ndarray
    probs: np.ndarray
    sums: np.ndarray


# what an interrupted attempt leaves
_UNFINISHED = {*(f"{name}.npy" for name in _Arrays._fields), _UNFINISHED_MANIFEST, _UNFINISHED_MANIFEST + PART}


class Listed(NamedTuple):
    """What is kept of some sentences.

    Attributes:
        words: shape ``(n, K)``, int64, the tokens of a sentence after those of the one before
        probs: shape ``(n, K)``, float32
        sound: of each sentence, whether this is what was written for its text, shape ``(B,)``, bool
    """

    words: np.ndarray
    probs: np.ndarray
    sound: np.ndarray


def read_manifest(folder: str) -> Dict[str, Any]:
    """What the cache in `folder` belongs to; empty if there is none, or one that was not finished.

    Raises:
        ConfigError: the folder holds something else, or what is there cannot be read
    """
    path = os.path.join(folder, _MANIFEST)
    with _system_errors_explained(folder, "let it be read, or name another folder"):
        entries = set(os.listdir(folder)) if os.path.lexists(folder) else set()
        if _MANIFEST not in entries:
            # read again: another process may have finished it in between
            if not os.path.lexists(path) and not _is_free(folder, entries):
                what = "a run's --save-dir" if LOCK in entries else "no teacher cache"
                raise ConfigError(
                    f"{FLAG} {folder}: it is {what}, and has files of its own ({sorted(entries)[0]}); name a cache, or "
                    "a folder that is empty or does not exist"
                )
            if not os.path.lexists(path):
                return {}
        return _read_manifest(path)


def check_parts(folder: str) -> None:
    """See that a folder can hold the caches of several parts of the data: it has nothing but their folders.

    Raises:
        ConfigError: it has
    """
    with _system_errors_explained(folder, "let it be read, or name another folder"):
        others = [entry for entry in os.listdir(folder) if not entry.isdigit()] if os.path.lexists(folder) else []
    if others:
        raise ConfigError(
            f"{FLAG} {folder}: the data has several parts, each with a cache of its own in it, and there is "
            f"{sorted(others)[0]}; name another folder"
        )


def _is_free(folder: str, entries: Set[str]) -> bool:
    """Whether a cache can be made in a folder: nothing is there but what an attempt to make one has left."""
    if entries <= {_UNFINISHED_MANIFEST + PART}:
        return True
    paths = [os.path.join(folder, entry) for entry in entries]
    are_ours = entries <= _UNFINISHED and _UNFINISHED_MANIFEST in entries
    return are_ours and not any(map(os.path.islink, paths))


def _read_manifest(path: str) -> Dict[str, Any]:
    require_regular(path)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.loads(file.read(_LARGEST_MANIFEST))
        words = found["vocabulary"]
        if type(words) is not int or type(found["top_k"]) is not int or not 0 < found["top_k"] <= words:
            raise ValueError(f"top_k {found['top_k']!r} of vocabulary {words!r}")
        return dict(found)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the bytes of a file can make json raise anything
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ConfigError(
            f"{FLAG}: {path}: it is no teacher cache's, or damaged ({cause}); name the folder of a cache, or one that "
            "does not exist"
        ) from error


def create(folder: str, manifest: Dict[str, Any], lengths: np.ndarray) -> None:
    """Make an empty cache, with all the space on the disk that it will need. One that is there is left alone.

    Several processes may ask for it at once: one makes it, and the others wait.

    Args:
        folder: its path
        manifest: what it belongs to, with ``top_k`` and ``vocabulary``
        lengths: of the target of each sentence in tokens, shape ``(sentences,)``

    Raises:
        ConfigError: the folder holds something else, cannot be written, or the disk has too little space; what was
            made of the cache is removed
    """
    layout = _layout(lengths, manifest["top_k"], manifest["vocabulary"])
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
    failed = f"a cache of {size / 1e9:.3g} GB cannot be made there: "
    with _system_errors_explained(folder, "name a folder with room for it", failed):
        os.makedirs(folder, exist_ok=True)
        with _locked(folder):
            if read_manifest(folder):
                return
            unfinished = os.path.join(folder, _UNFINISHED_MANIFEST)
            try:
                # first: what is beside it, is of an attempt
                with written_whole(unfinished) as file:
                    file.write(json.dumps(manifest, indent=1).encode())
                for name, (shape, dtype) in layout.items():
                    _make(_path(folder, name), shape, dtype)
                os.replace(unfinished, os.path.join(folder, _MANIFEST))  # last: with it, the cache is there
            except BaseException:
                for path in [*(_path(folder, name) for name in layout), unfinished]:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                raise


def _make(path: str, shape: Tuple[int, ...], dtype: Any) -> None:
    with contextlib.suppress(FileNotFoundError):  # of an earlier attempt
        os.unlink(path)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            # else a disk that fills up later would end the process without a word
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Alone among the processes that ask for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class CacheFiles:
    """At each target token of a training set the K most probable words and their probabilities.

    ``words.npy``, shape ``(tokens, K)``, uint16 (uint32 for more than 65,536 words); ``probs.npy``, the same in
    float32; ``sums.npy``, shape ``(sentences,)``, uint32: the checksum of each sentence's text and of what is kept of
    it, 0 where that is nothing yet. A sentence's rows come after those of the sentence before it in the training set,
    so that several processes can fill in different sentences at once.

    Args:
        folder: that :func:`create` made
        manifest: its manifest
        lengths: of the target of each sentence in tokens, shape ``(sentences,)``
        writable: whether :meth:`write` will be called

    Raises:
        ConfigError: an array is missing, cut short or of another shape or type, or cannot be written
    """

    def __init__(self, folder: str, manifest: Dict[str, Any], lengths: np.ndarray, writable: bool) -> None:
        self.folder = folder
        self._lengths = lengths
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._manifest = manifest
        layout = _layout(lengths, manifest["top_k"], manifest["vocabulary"])
        mode = "r+" if writable else "r"
        self._arrays = _Arrays(*(_open(folder, name, *layout[name], mode) for name in _Arrays._fields))

    def __reduce__(self) -> Tuple[Any, ...]:
        """A process that is given them opens them: the arrays would be copied. It only reads."""
        return CacheFiles, (self.folder, self._manifest, self._lengths, False)

    def there(self, ids: np.ndarray) -> np.ndarray:
        """Of each sentence, shape ``(B,)``, whether something is kept of it, bool."""
        return self._arrays.sums[ids] != 0

    def read(self, ids: np.ndarray, lengths: np.ndarray, texts: Sequence[int]) -> Listed:
        """What is kept of some sentences.

        Args:
            ids: which sentences of the training set, shape ``(B,)``
            lengths: their tokens, shape ``(B,)``
            texts: a checksum of each sentence's source and target
        """
        rows = self._rows(ids, lengths)
        words, probs = self._arrays.words[rows], self._arrays.probs[rows]
        sound = self._arrays.sums[ids] == _checksums(words, probs, lengths, texts)
        return Listed(words.astype(np.int64), probs, sound)

    def write(
        self, ids: np.ndarray, lengths: np.ndarray, texts: Sequence[int], words: np.ndarray, probs: np.ndarray
    ) -> None:
        """Keep what was found of some sentences; arguments and shapes as in :meth:`read` and :class:`Listed`."""
        rows = self._rows(ids, lengths)
        words = words.astype(self._arrays.words.dtype)
        self._arrays.words[rows], self._arrays.probs[rows] = words, probs
        self._arrays.sums[ids] = _checksums(words, probs, lengths, texts)

    def _rows(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        assert (lengths <= self._lengths[ids]).all()
        starts = self._starts[ids]
        return np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths)])


def _layout(lengths: np.ndarray, top_k: int, vocabulary: int) -> Dict[str, Tuple[Tuple[int, ...], Any]]:
    """Shape and type of each array."""
    tokens = int(lengths.sum())
    return {
        "words": ((tokens, top_k), np.uint16 if vocabulary <= 2**16 else np.uint32),
        "probs": ((tokens, top_k), np.float32),
        "sums": ((len(lengths),), np.uint32),
    }


def _path(folder: str, name: str) -> str:
    return os.path.join(folder, f"{name}.npy")


def _open(folder: str, name: str, shape: Tuple[int, ...], dtype: Any, mode: Any) -> np.ndarray:
    path = _path(folder, name)
    access = "let it be written" if mode == "r+" else "let it be read"
    with _system_errors_explained(path, f"{access}, or name another folder"):
        require_regular(path)
        size = os.path.getsize(path)
        try:
            # numpy makes a file that was cut short as long as it should be
            with open(path, "rb") as file:
                header = np.lib.format.read_magic(file) and np.lib.format.read_array_header_1_0(file)
                expected = file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize
            if header != (shape, False, np.dtype(dtype)) or size != expected:
                raise ValueError(f"{header[2]} {header[0]} in {size} bytes, in place of {expected}")
            return np.load(path, mmap_mode=mode)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the bytes of a file can make numpy raise anything
            cause = str(error).strip().splitlines()[:1]
            raise ConfigError(
                f"{FLAG}: {path}: cut short, damaged, or not of a teacher cache ({type(error).__name__}: "
                f"{''.join(cause)}); bring a whole one back, or name another folder"
            ) from error


def _checksums(words: np.ndarray, probs: np.ndarray, lengths: np.ndarray, texts: Sequence[int]) -> np.ndarray:
    """Of each sentence, from its text's and what is kept of it; never 0."""
    stops = np.cumsum(lengths)
    parts = zip(texts, stops - lengths, stops)
    sums = [zlib.crc32(probs[a:b].tobytes(), zlib.crc32(words[a:b].tobytes(), text)) or 1 for text, a, b in parts]
    return np.array(sums, dtype=np.uint32)


@contextlib.contextmanager
def _system_errors_explained(path: str, remedy: str, failed: str = "") -> Iterator[None]:
    """Say what the system said of a file: it is not the file's fault, which may be whole."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith(FLAG):
            raise
        raise ConfigError(f"{FLAG}: {error}") from error
    except (OSError, MemoryError) as error:
        remedy = _REMEDIES.get(getattr(error, "errno", errno.ENOMEM), remedy)
        said = getattr(error, "strerror", None) or str(error) or "no memory"
        raise ConfigError(f"{FLAG}: {path}: {failed}{said}; {remedy}") from error


_REMEDIES = {
    errno.ENOMEM: "free memory or address space (ulimit -v), then give the same command again",
    errno.EMFILE: "allow more open files (ulimit -n), then give the same command again",
    errno.ENFILE: "close files of other programs, then give the same command again",
    errno.EIO: "see what is wrong with the disk; another try may do",
    errno.ESTALE: "give the same command again when the network file system is back",
}

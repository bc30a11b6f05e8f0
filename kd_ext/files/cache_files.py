"""The files of a teacher cache: plain arrays that are mapped into memory, and a manifest of what they belong to."""

import contextlib
import fcntl
import json
import os
import zlib
from typing import Any, Dict, Iterator, NamedTuple, Sequence, Tuple

import numpy as np

from kd_ext.errors import ConfigError
from kd_ext.files.writing import PART, written_whole

FLAG = "--teacher-cache-dir"
_MANIFEST = "manifest.json"


class _Arrays(NamedTuple):
    words: np.ndarray
    probs: np.ndarray
    sums: np.ndarray


# what can be there before the manifest is
_UNFINISHED = {*(f"{name}.npy" for name in _Arrays._fields), _MANIFEST + PART}


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
        ConfigError: the folder holds something else
    """
    entries = os.listdir(folder) if os.path.isdir(folder) else []
    if all(entry in _UNFINISHED for entry in entries):
        return {}
    with _explained(folder, "it is no teacher cache; name one, or a folder that does not exist"):
        with open(os.path.join(folder, _MANIFEST), encoding="utf-8") as file:
            return dict(json.load(file))


def create(folder: str, manifest: Dict[str, Any], lengths: np.ndarray) -> None:
    """Make an empty cache, with all the space on the disk that it will need. One that is there is left alone.

    Several processes may ask for it at once: one makes it, and the others wait.

    Args:
        folder: its path
        manifest: what it belongs to, with ``top_k`` and ``vocabulary``
        lengths: of the target of each sentence in tokens, shape ``(sentences,)``

    Raises:
        ConfigError: the folder cannot be written, or the disk has too little space
    """
    layout = _layout(lengths, manifest["top_k"], manifest["vocabulary"])
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
    with _explained(folder, f"a cache of {size / 1e9:.3g} GB cannot be made there; name a folder with room for it"):
        os.makedirs(folder, exist_ok=True)
        with _locked(folder):
            if read_manifest(folder):
                return
            try:
                for name, (shape, dtype) in layout.items():
                    path = _path(folder, name)
                    np.lib.format.open_memmap(path, "w+", dtype, shape)
                    if hasattr(os, "posix_fallocate"):
                        # else a disk that fills up later would end the process without a word
                        with open(path, "r+b") as file:
                            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
                with written_whole(os.path.join(folder, _MANIFEST)) as file:  # last: with it, the cache is there
                    file.write(json.dumps(manifest, indent=1).encode())
            except BaseException:
                for name in layout:
                    with contextlib.suppress(OSError):
                        os.unlink(_path(folder, name))
                raise


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
    with _explained(path, "damaged, cut short, or not of a teacher cache; remove the folder to make it anew"):
        # numpy makes a file that was cut short as long as it should be
        with open(path, "rb") as file:
            header = np.lib.format.read_magic(file) and np.lib.format.read_array_header_1_0(file)
            expected = file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize
        if header != (shape, False, np.dtype(dtype)) or os.path.getsize(path) != expected:
            raise ValueError(f"{header[2]} {header[0]} in {os.path.getsize(path)} bytes")
        return np.load(path, mmap_mode=mode)


def _checksums(words: np.ndarray, probs: np.ndarray, lengths: np.ndarray, texts: Sequence[int]) -> np.ndarray:
    """Of each sentence, from its text's and what is kept of it; never 0."""
    stops = np.cumsum(lengths)
    parts = zip(texts, stops - lengths, stops)
    sums = [zlib.crc32(probs[a:b].tobytes(), zlib.crc32(words[a:b].tobytes(), text)) or 1 for text, a, b in parts]
    return np.array(sums, dtype=np.uint32)


@contextlib.contextmanager
def _explained(path: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except PermissionError as error:
        raise ConfigError(f"{FLAG}: {path}: {error.strerror}; let it be written, or name another folder") from error
    except Exception as error:  # the bytes of a file can make numpy and json raise anything
        cause = str(error).strip().splitlines()[:1]
        raise ConfigError(f"{FLAG}: {path}: {remedy} ({type(error).__name__}: {''.join(cause)})") from error

"""A teacher whose answers are kept: what it once said of a sentence is read from files, and it may be gone."""

import hashlib
import logging
import os
import zlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from fairseq import utils
from torch import Tensor

from kd_ext.errors import ConfigError, in_short
from kd_ext.files.cache_files import FLAG, CacheFiles, Listed, check_parts, create, read_manifest
from kd_ext.files.trained_with import of_dictionaries
from kd_ext.modules.positions import Positions
from kd_ext.modules.teacher import Teacher
from kd_ext.modules.top_probs import TopProbs, top_probs
from kd_ext.teachers.by_language import TeachersByLanguage

logger = logging.getLogger(__name__)

FORMAT = "kd_ext teacher cache 1"
DEFAULT_TOP_K = 32
# in a batch, of all its target tokens that are not padding, in the order of rows
_WORDS, _PROBS = "teacher_words", "teacher_probs"
_NAME_TEACHER = "name the teacher that fills it by --teacher-checkpoint-path"


class TeacherSource(NamedTuple):
    """Where the teacher comes from, should it be needed.

    Attributes:
        path: as it was given; None if it was not
        identify: reads what tells it from other teachers
        load: reads it
    """

    path: Optional[str]
    identify: Callable[[], str]
    load: Callable[[], Union[Teacher, TeachersByLanguage]]


class CachedTeacher:
    """The K most probable words of a teacher at each target token, from files where it was asked before.

    Words that are not listed share evenly what probability the listed ones leave. A sentence that is not in the files
    yet is asked of the teacher and written, so that in a later epoch, another run or another student it is read. What
    is used is what was written: whether it was there before makes no difference.

    Args:
        folder: of the files; it is made if it is not there
        top_k: K; None: as the files have it, 32 for new ones
        temperature: T of the softmax that is kept
        source: where the teacher comes from
        student_task: gives the dictionaries, the folders of the data, of which each has files of its own, and the
            precision of the teacher, if that was given
        mends: whether :meth:`mend` will be called

    Attributes:
        identity: what tells the teacher from others
        mends: as it was given

    Raises:
        ConfigError: K is not from 1 to V, or there are no files and no teacher to fill them
    """

    def __init__(
        self,
        folder: str,
        top_k: Optional[int],
        temperature: float,
        source: TeacherSource,
        student_task: Any,
        mends: bool = False,
    ) -> None:
        words = student_task.target_dictionary
        if top_k is not None and not 0 < top_k <= len(words):
            raise ConfigError(f"--teacher-cache-top-k {top_k}: out of range; a number from 1 to {len(words)}")
        self._top_k, self._source = top_k, source
        self.mends = mends
        self._temperature, self._vocabulary, self._pad = temperature, len(words), words.pad()
        self._dictionaries = of_dictionaries(student_task.source_dictionary, words)
        parts = len(utils.split_paths(student_task.cfg.data))
        self._folders = [folder] if parts == 1 else [os.path.join(folder, str(part)) for part in range(parts)]
        if parts > 1:
            check_parts(folder)
        self._dtype: Optional[str] = student_task.cfg.teacher_dtype
        manifests = {of_part: read_manifest(of_part) for of_part in self._folders}
        self.identity: str = source.identify() if source.path else _recorded_identity(manifests)
        for of_part, manifest in manifests.items():  # now: that of another part would be found an epoch late
            if manifest:
                self._compare(of_part, manifest, self._manifest())
                self._take_from(manifest)
        self._teacher: Union[Teacher, TeachersByLanguage, None] = None
        self._place: Optional[Tuple[torch.device, torch.dtype]] = None
        self._compiles = False
        self._opened: Optional[CacheFiles] = None

    def prepare(self, dataset: Any, max_positions: Any = None, epoch: int = 1) -> None:
        """Open the files for a training set, and load the teacher if it has to fill them, or let go of it if not.

        :meth:`place` is called before.

        Args:
            dataset: fairseq's ``LanguagePairDataset``
            max_positions: longer sentences will not be asked for
            epoch: tells which part of the training set it is, where that has several

        Raises:
            ConfigError: the files belong to something else or are damaged, or a teacher is needed and was not given
        """
        folder = self._folders[(epoch - 1) % len(self._folders)]
        lengths = np.asarray(dataset.tgt_sizes, dtype=np.int64)
        expected = {**self._manifest(), **_of_sentences(np.asarray(dataset.src_sizes, dtype=np.int64), lengths)}
        found = read_manifest(folder)
        if not found:
            self._load_for(f"{FLAG} {folder}: there is no cache yet")
            of_teacher = {"teacher": self.identity, "teacher_path": self._source.path, "teacher_dtype": self._dtype}
            top_k = self._top_k or min(DEFAULT_TOP_K, self._vocabulary)
            create(folder, {**expected, "top_k": top_k, **of_teacher}, lengths)
            found = read_manifest(folder)
        self._compare(folder, found, expected)
        self._take_from(found)

        asked_for, _ = dataset.filter_indices_by_size(np.arange(len(dataset)), max_positions)
        self._opened = CacheFiles(folder, found, lengths, writable=False)
        there = self._opened.there(asked_for)
        missing = len(there) - np.count_nonzero(there)
        if missing or self.mends:
            self._opened = CacheFiles(folder, found, lengths, writable=True)
        logger.info(
            *("%s %s: the %d most probable words of %d sentences, of which %d are there",),
            *(FLAG, folder, self._top_k, len(there), len(there) - missing),
        )
        if missing:
            self._load_for(f"{FLAG} {folder}: {missing} of {len(there)} sentences are not there")
        elif self._teacher is not None:
            self._teacher = None
            logger.info("the teacher is not needed any more")

    @property
    def is_prepared(self) -> bool:
        return self._opened is not None

    @property
    def files(self) -> CacheFiles:
        """Those of the training set that :meth:`prepare` was called for last."""
        assert self._opened is not None
        return self._opened

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where the teacher is moved if it has to be asked."""
        self._place = device, dtype

    def compile_layers(self) -> None:
        """Compile the teacher's layers if it has to be asked."""
        self._compiles = True
        if self._teacher is not None:
            self._teacher.compile_layers()

    def output(self, sample: Dict[str, Any], positions: Positions) -> TopProbs:
        """What is known of the chosen target positions.

        Args:
            sample: a batch of the training set: its ``id``, ``net_input`` and ``target``
            positions: n of them, in a batch of shape ``(B, T)``

        Returns:
            of n tokens, on the device of the positions

        Raises:
            ConfigError: what is there of a sentence is not what was written, or was written for another text
        """
        if _WORDS in sample:
            return self._brought(sample, positions)
        sentences = _Sentences.of(sample, self._pad)
        there = self.files.there(sentences.ids)  # first: another process may write them in between
        listed = self.files.read(*sentences.key)
        if not listed.sound.all():
            self._refuse_damage(sentences.ids[there & ~listed.sound])
            listed = self._ask(sample, sentences, ~listed.sound)
        rows = positions.mask
        chosen = rows[sentences.real].cpu()
        words, probs = torch.from_numpy(listed.words)[chosen], torch.from_numpy(listed.probs)[chosen]
        return TopProbs(words.to(rows.device), probs.to(rows.device), self._vocabulary)

    def _brought(self, sample: Dict[str, Any], positions: Positions) -> TopProbs:
        words, probs = sample[_WORDS].long(), sample[_PROBS].view(torch.float32)
        if positions.count() != len(words):  # of a prefix nothing is asked
            chosen = positions.mask[sample["target"].ne(self._pad)]
            words, probs = words[chosen], probs[chosen]
        return TopProbs(words, probs, self._vocabulary)

    def probs(self, sample: Dict[str, Any], positions: Positions, temperature: float) -> Tensor:
        """The probability of every word at the chosen positions, shape ``(n, V)``, float32, as :meth:`output`."""
        return self.output(sample, positions).dense()

    def mend(self, sample: Dict[str, Any]) -> None:
        """Ask for what is not there of a batch, or is damaged."""
        sentences = _Sentences.of(sample, self._pad)
        sound = self.files.read(*sentences.key).sound
        if not sound.all():
            self._load_for(f"{FLAG} {self.files.folder}: sentence {sentences.ids[~sound][0]} has to be mended")
            self._ask(sample, sentences, ~sound)

    def _manifest(self) -> Dict[str, Any]:
        """What the files of all parts of the data have in common."""
        return {
            "format": FORMAT,
            "temperature": self._temperature,
            "vocabulary": self._vocabulary,
            **self._dictionaries,
        }

    def _take_from(self, manifest: Dict[str, Any]) -> None:
        """What is as the files have it, where no flag says it."""
        self._top_k = manifest["top_k"]
        self._dtype = self._dtype or manifest.get("teacher_dtype")

    def _compare(self, folder: str, found: Dict[str, Any], expected: Dict[str, Any]) -> None:
        """Refuse files that are not what this run would have made."""
        expected = {**expected, "teacher": self.identity}
        if self._top_k is not None:
            expected = {**expected, "top_k": self._top_k}
        if self._dtype is not None and "teacher_dtype" in found:  # not in those of earlier versions
            expected = {**expected, "teacher_dtype": self._dtype}
        differing = [key for key in expected if found.get(key) != expected[key]]
        if not differing:
            return
        key = differing[0]
        flag, value, remedy = {
            "top_k": ("--teacher-cache-top-k", self._top_k, f"use {in_short(found.get(key))}"),
            "temperature": ("--kd-temperature", self._temperature, f"use {in_short(found.get(key))}"),
            "teacher": ("--teacher-checkpoint-path", self._source.path, f"name {in_short(found.get('teacher_path'))}"),
            "teacher_dtype": ("--teacher-dtype", self._dtype, f"use {in_short(found.get(key))}"),
            "lengths_of_sentences": (FLAG, folder, "name that data, with the same flags (--num-batch-buckets, ...)"),
        }.get(key, (FLAG, folder, "name that data"))
        what = key.replace("_", " ")
        raise ConfigError(f"{flag} {value}: the cache {folder} was made with other {what}; {remedy}, or another {FLAG}")

    def _load_for(self, reason: str) -> None:
        if not self._source.path:
            raise ConfigError(f"{reason}; {_NAME_TEACHER}")
        assert self._place is not None
        dtype = str(self._place[1]).rpartition(".")[2]
        self._dtype = self._dtype or dtype
        if dtype != self._dtype:  # if the flag was given, it is the same
            raise ConfigError(
                f"--teacher-dtype is missing: the student's precision, in which the teacher would run, is {dtype}, and "
                f"what is in the cache was made in {in_short(self._dtype)}; give --teacher-dtype "
                f"{in_short(self._dtype)}, or name another {FLAG}"
            )
        if self._teacher is None:
            self._teacher = self._source.load()
            if self._compiles:
                self._teacher.compile_layers()

    def _refuse_damage(self, damaged: np.ndarray) -> None:
        if len(damaged) > 0:
            raise ConfigError(
                f"{FLAG} {self.files.folder}: sentence {damaged[0]} is damaged, or is of another text; "
                "python -m kd_ext.teacher_cache with the same flags mends it"
            )

    def _ask(self, sample: Dict[str, Any], sentences: "_Sentences", missing: np.ndarray) -> Listed:
        """Ask the teacher about a batch, write what is missing, and read it all."""
        assert self._teacher is not None
        assert self._top_k is not None
        assert self._place is not None
        device, dtype = self._place
        self._teacher.place(device, dtype)
        with torch.autocast(device.type, enabled=False):  # --amp: it would be asked in half precision
            found = top_probs(self._teacher.output(sample, Positions(sentences.real)), self._top_k, self._temperature)
        tokens = np.repeat(missing, sentences.lengths)
        words, probs = (x.cpu().numpy()[tokens] for x in (found.words, found.probs.float()))
        if not np.isfinite(probs).all():
            raise ConfigError(
                f"{FLAG} {self.files.folder}: probabilities of the teacher are not numbers, for sentences "
                f"{sentences.ids.tolist()[:3]} ...; if it runs in half precision, fill the cache in float32"
            )
        texts = [text for text, is_missing in zip(sentences.texts, missing) if is_missing]
        self.files.write(sentences.ids[missing], sentences.lengths[missing], texts, words, probs)
        return self.files.read(*sentences.key)


class BringsOutput:
    """Makes batches, as a data loader asks for, that bring along what is in the files of them.

    It is read and copied where batches are made, before they are needed. A batch of which anything is missing is left
    as it is.

    Args:
        collate: makes a batch from sentences
        pad: the padding symbol's id

    Attributes:
        files: of the training set; None: not opened yet
    """

    def __init__(self, collate: Callable[[Any], Dict[str, Any]], pad: int) -> None:
        self.files: Optional[CacheFiles] = None
        self._collate, self._pad = collate, pad

    def __call__(self, sentences: Any) -> Dict[str, Any]:
        sample = self._collate(sentences)
        if sample and self.files is not None:
            listed = self.files.read(*_Sentences.of(sample, self._pad).key)
            if listed.sound.all():
                sample[_WORDS] = torch.from_numpy(listed.words).int()
                # as whole numbers: a trainer makes half precision of all that is not
                sample[_PROBS] = torch.from_numpy(listed.probs).view(torch.int32)
        return sample


class _Sentences(NamedTuple):
    """The sentences of a batch, B of them.

    Attributes:
        ids: in the training set, shape ``(B,)``
        lengths: target tokens, shape ``(B,)``
        texts: a checksum of each one's source and target
        real: where their target tokens are, shape ``(B, T)``, bool
    """

    ids: np.ndarray
    lengths: np.ndarray
    texts: List[int]
    real: Tensor

    @property
    def key(self) -> Tuple[np.ndarray, np.ndarray, List[int]]:
        return self.ids, self.lengths, self.texts

    @classmethod
    def of(cls, sample: Dict[str, Any], pad: int) -> "_Sentences":
        real = sample["target"].ne(pad)
        sources, targets = (x.cpu().numpy() for x in (sample["net_input"]["src_tokens"], sample["target"]))
        texts = [
            zlib.crc32(target[target != pad].tobytes(), zlib.crc32(source[source != pad].tobytes()))
            for source, target in zip(sources, targets)
        ]
        return cls(sample["id"].cpu().numpy(), real.sum(1).cpu().numpy(), texts, real)


def _of_sentences(source_lengths: np.ndarray, target_lengths: np.ndarray) -> Dict[str, Any]:
    lengths = np.stack([source_lengths, target_lengths])
    digest = hashlib.sha256(lengths.tobytes()).hexdigest()[:16]
    return {"sentences": len(target_lengths), "lengths_of_sentences": digest}


def _recorded_identity(manifests: Dict[str, Dict[str, Any]]) -> str:
    """Of the teacher that all parts of a cache are to be of."""
    for folder, manifest in manifests.items():
        if "teacher" not in manifest:
            raise ConfigError(f"{FLAG} {folder}: there is no cache yet; {_NAME_TEACHER}")
    return str(next(iter(manifests.values()))["teacher"])

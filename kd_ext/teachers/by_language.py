"""A teacher for each language: each sentence is distilled from that of its own (Tan et al., 2019).

Xu Tan, Yi Ren, Di He, Tao Qin, Zhou Zhao and Tie-Yan Liu, 2019: "Multilingual Neural Machine Translation with Knowledge
Distillation".
"""

from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from kd_ext.errors import ConfigError
from kd_ext.modules.chunked_logits import TeacherLogits
from kd_ext.modules.fetched import Fetched
from kd_ext.modules.parted_logits import PartedLogits
from kd_ext.modules.positions import Positions
from kd_ext.modules.teacher import Teacher
from kd_ext.teachers.kinds import FLAG

_PARTS = "teacher_parts"  # of a batch that brings them along

# from a batch to the pool of each sentence, shape ``(B,)``, int64
OfBatch = Callable[[Dict[str, Any]], Tensor]


class Part(NamedTuple):
    """The sentences of a batch that one teacher is asked about.

    Attributes:
        teacher: its number
        rows: the sentences
        source: the columns of the source that are not all padding, first and after the last
        target: those of the target
    """

    teacher: int
    rows: List[int]
    source: Tuple[int, int]
    target: Tuple[int, int]


class SplitByTeacher:
    """Tells which teacher is asked about which sentences of a batch.

    Args:
        of_pools: of each pool the number of its teacher; None: it has none
        of_batch: the pools of a batch's sentences
        pad: the padding symbol's id
    """

    def __init__(self, of_pools: Sequence[Optional[int]], of_batch: OfBatch, pad: int) -> None:
        self._of_pools, self._of_batch, self._pad = list(of_pools), of_batch, pad

    def __call__(self, sample: Dict[str, Any]) -> List[Part]:
        """The teachers of a batch and their sentences, as it brings them along or, else, as its tokens say.

        Raises:
            ConfigError: a sentence of a language that has no teacher
        """
        if _PARTS in sample:
            return [Part(*part) for part in sample[_PARTS]]
        teachers = self.of_sentences(sample)
        inputs = sample["net_input"]
        source, target, previous = (
            x.ne(self._pad).cpu().numpy()
            for x in (inputs["src_tokens"], sample["target"], inputs["prev_output_tokens"])
        )
        parts = []
        for teacher in sorted(set(teachers)):
            rows = [row for row, of_row in enumerate(teachers) if of_row == teacher]
            parts.append(Part(teacher, rows, _columns(source[rows]), _columns(target[rows] | previous[rows])))
        return parts

    def of_sentences(self, sample: Dict[str, Any]) -> List[int]:
        """The number of each sentence's teacher."""
        teachers: List[int] = []
        for row, pool in enumerate(self._of_batch(sample).tolist()):
            teacher = self._of_pools[pool]
            if teacher is None:
                number = f" {int(sample['id'][row])}" if "id" in sample else ""
                raise ConfigError(f"{FLAG}: sentence{number} is of a language without a teacher; name one: ...=base.pt")
            teachers.append(teacher)
        return teachers


class BringsParts:
    """Makes batches, as a data loader asks for, that bring along which teacher has which of their sentences.

    Of a batch that is on a GPU it would have to be asked, and waited for.
    """

    def __init__(self, collate: Callable[[Any], Dict[str, Any]], split: SplitByTeacher) -> None:
        self._collate, self._split = collate, split

    def __call__(self, sentences: Any) -> Dict[str, Any]:
        sample = self._collate(sentences)
        return {**sample, _PARTS: self._split(sample)} if sample else sample


class TeachersByLanguage:
    """Several teachers that look like one: of a batch each is asked once, for the sentences of its languages.

    It has the interface of :class:`~kd_ext.modules.teacher.Teacher`.

    Args:
        load: loads each teacher
        split: which sentences of a batch are whose
        identify: from what tells each teacher from others to what tells all of them, so assigned
        keeps_all: whether all are in memory from the beginning; else only the one that was asked last

    Raises:
        ConfigError: a teacher cannot be used
    """

    def __init__(
        self,
        load: Sequence[Callable[[], Teacher]],
        split: SplitByTeacher,
        identify: Callable[[Sequence[str]], str] = " ".join,
        keeps_all: bool = True,
    ) -> None:
        self.split = split
        self._load, self._keeps_all = load, keeps_all
        self._place: Optional[Tuple[torch.device, torch.dtype]] = None
        self._compiles = False
        self._loaded: Dict[int, Teacher] = {}
        # all at once: what is wrong with one is said before there is work
        self.identity = identify([self._teacher(number).identity for number in range(len(load))])

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights to a device and a dtype; a no-op when they are there."""
        self._place = device, dtype
        for teacher in self._loaded.values():
            teacher.place(device, dtype)

    def compile_layers(self) -> None:
        """Compile the layers of each, as :func:`~kd_ext.modules.compiled_layers.compile_layers`."""
        self._compiles = True
        for teacher in self._loaded.values():
            teacher.compile_layers()

    def output(self, sample: Dict[str, Any], positions: Positions) -> Union[Sequence[TeacherLogits], PartedLogits]:
        """The logits at the chosen target positions, each token's of its sentence's teacher.

        Args:
            sample: a batch; its ``net_input`` are the arguments of the models' forward
            positions: n of them, in a batch of shape ``(B, T)``

        Returns:
            of n tokens; of one teacher, as its own, where all are of one

        Raises:
            ConfigError: a sentence of a language that has no teacher
        """
        asked = _Asked(self.split(sample), sample, positions)
        logits = [self._teacher(number).output(*question) for number, question in asked]
        return logits[0] if len(logits) == 1 else PartedLogits(logits, asked.sizes(), asked.order())

    def probs(self, sample: Dict[str, Any], positions: Positions, temperature: float = 1.0) -> Tensor:
        """The probability of every word at the chosen positions, shape ``(n, V)``, float32, without gradient."""
        asked = _Asked(self.split(sample), sample, positions)
        probs = torch.cat([self._teacher(number).probs(*question, temperature) for number, question in asked])
        return torch.empty_like(probs).index_copy_(0, asked.order(), probs)

    def _teacher(self, number: int) -> Teacher:
        if number not in self._loaded:
            if not self._keeps_all:
                self._loaded.clear()
            teacher = self._load[number]()
            if self._place is not None:
                teacher.place(*self._place)
            if self._compiles:
                teacher.compile_layers()
            self._loaded[number] = teacher
        return self._loaded[number]


class _Asked:
    """What each teacher is asked: a batch of its own, and positions in it.

    How many tokens it has is fetched from the device while that is busy with the teachers.
    """

    def __init__(self, parts: Sequence[Part], sample: Dict[str, Any], positions: Positions) -> None:
        self._parts, self._sample, self._positions = parts, sample, positions
        self._lengths = Fetched(positions.mask.sum(1))
        rows = torch.tensor([row for part in parts for row in part.rows])
        if positions.mask.device.type == "cuda":  # pinned, so that nobody waits
            rows = rows.pin_memory().to(positions.mask.device, non_blocking=True)
        self._rows = rows.to(positions.mask.device)

    def __iter__(self) -> Iterator[Tuple[int, Tuple[Dict[str, Any], Positions]]]:
        for part, rows in zip(self._parts, self._rows.split([len(part.rows) for part in self._parts])):
            mask = self._positions.mask.index_select(0, rows)[:, slice(*part.target)]
            yield part.teacher, (_some_rows(self._sample, part, rows), Positions(mask, partial(self._size, part)))

    def _size(self, part: Part) -> int:
        lengths = self._lengths.wait()
        return sum(lengths[row] for row in part.rows)

    def sizes(self) -> List[int]:
        """The tokens of each teacher."""
        return [self._size(part) for part in self._parts]

    def order(self) -> Tensor:
        """The tokens of all teachers, one teacher after the other: which of the batch they are, shape ``(n,)``."""
        places = torch.arange(self._rows.numel(), device=self._rows.device)
        rank = torch.empty_like(self._rows).scatter_(0, self._rows, places)  # of each sentence
        of_tokens = self._positions.take(rank.unsqueeze(1).expand_as(self._positions.mask))
        return torch.sort(of_tokens, stable=True).indices


def _some_rows(sample: Dict[str, Any], part: Part, rows: Tensor) -> Dict[str, Any]:
    """A batch of some sentences, without the columns in which they have nothing."""
    count = sample["target"].size(0)
    columns = {"src_tokens": part.source, "prev_output_tokens": part.target}

    def some(name: str, value: Any) -> Any:
        if not torch.is_tensor(value) or value.dim() == 0 or value.size(0) != count:
            return value
        value = value.index_select(0, rows)
        return value[:, slice(*columns[name])] if name in columns else value

    inputs = {name: some(name, value) for name, value in sample["net_input"].items()}
    others = {"target": some("target", sample["target"])[:, slice(*part.target)], "nsentences": len(part.rows)}
    if "id" in sample:
        others["id"] = some("id", sample["id"])
    return {"net_input": inputs, **others}


def _columns(mask: np.ndarray) -> Tuple[int, int]:
    """From the first to after the last column in which any row is true, of shape ``(B, S)``."""
    found = np.flatnonzero(mask.any(0))
    return int(found[0]), int(found[-1]) + 1

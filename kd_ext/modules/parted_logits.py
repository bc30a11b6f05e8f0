"""Tokens that are of several teachers, each of one: the teachers' logits, teacher by teacher."""

from itertools import accumulate
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from kd_ext.modules.chunked_logits import TeacherBlock, TeacherChunks, TeacherLogits, spans
from kd_ext.modules.fetched import Fetched
from kd_ext.modules.positions import true_first


class PartedLogits(NamedTuple):
    """The logits of n tokens, of which each part is of another teacher, or of an ensemble of another size.

    Attributes:
        parts: of each the logits of its models
        sizes: of each how many tokens it has, n in all
        order: which tokens they are, part by part, shape ``(n,)``, int64
    """

    parts: Sequence[Sequence[TeacherLogits]]
    sizes: List[int]
    order: Tensor

    def of(self, tokens: Tensor) -> "PartedLogits":
        """Those of some tokens, shape ``(m,)``, int64, no token twice.

        How many of them each part has is fetched from the device.
        """
        place = torch.full_like(self.order, -1)
        place[tokens] = torch.arange(tokens.numel(), device=tokens.device)
        places = place[self.order].split(self.sizes)  # among the tokens that are asked for, -1: not among them
        sizes = Fetched(torch.stack([(part >= 0).sum() for part in places])).wait()
        rows = [true_first(part >= 0)[:size] for part, size in zip(places, sizes)]
        parts = [[logits.of(at) for logits in part] for part, at in zip(self.parts, rows)]
        return PartedLogits(parts, sizes, torch.cat([part[at] for part, at in zip(places, rows)]))

    def as_autocast(self) -> "PartedLogits":
        """The same in the dtype in which automatic mixed precision would multiply them."""
        return self._replace(parts=[[logits.as_autocast() for logits in part] for part in self.parts])

    def spans(self, size: int) -> Iterator[Tuple[int, int]]:
        """All tokens, part by part, in pieces of at most `size` that are each of one part."""
        for stop, length in zip(accumulate(self.sizes), self.sizes):
            yield from spans(stop - length, stop, size)


class PartedChunks:
    """What :class:`~kd_ext.modules.chunked_logits.TeacherChunks` is for one teacher.

    Chunks are those of :meth:`PartedLogits.spans`, in their order, so that one teacher's memory is there at a time.
    """

    share: Optional[Tensor] = None

    def __init__(self, parted: PartedLogits, temperature: float) -> None:
        self._parted, self._temperature = parted, temperature
        self._stops = list(accumulate(parted.sizes))
        self._part = -1
        self._chunks: Optional[TeacherChunks] = None

    def _of(self, start: int, stop: int) -> Tuple[TeacherChunks, int, int]:
        part = next(i for i, end in enumerate(self._stops) if start < end)
        if self._chunks is None or part != self._part:
            self._part, self._chunks = part, None  # before there is another
            self._chunks = TeacherChunks(self._parted.parts[part], self._temperature)
        first = self._stops[part] - self._parted.sizes[part]
        return self._chunks, start - first, stop - first

    def load(self, start: int, stop: int) -> None:
        """Compute the chunk of the tokens from `start` to `stop`, which are of one part."""
        chunks, start, stop = self._of(start, stop)
        chunks.load(start, stop)

    @property
    def fits_row_kernel(self) -> bool:
        """Whether the kernel of a row takes what :meth:`of_rows` gives."""
        return all(len(models) == 1 for models in self._parted.parts)

    def of_rows(self, start: int, stop: int) -> Dict[str, Any]:
        """The chunk that was loaded, for that kernel."""
        chunks, start, stop = self._of(start, stop)
        return chunks.of_rows(start, stop)

    def block(self, rows: slice, scratch: Tensor) -> TeacherBlock:
        """Some rows of the chunk, once each."""
        assert self._chunks is not None
        return self._chunks.block(rows, scratch)

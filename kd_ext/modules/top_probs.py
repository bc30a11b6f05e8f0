"""A teacher's distributions by their most probable words alone: what is kept of it where all words are too many."""

from typing import Any, Dict, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from kd_ext.modules.chunked_logits import LinearLogits, TeacherChunks, TeacherLogits, chunk_rows, spans
from kd_ext.modules.parted_logits import PartedLogits

# of a row, for the kernel
LONGEST_LIST = 1024


class TopProbs(NamedTuple):
    """Distributions over V words for n tokens. The words that are not listed share evenly what the listed ones leave.

    With K = V nothing is left, and the distributions are exact.

    Attributes:
        words: the K most probable ones, shape ``(n, K)``, int64
        probs: theirs, shape ``(n, K)``
        vocabulary: V
    """

    words: Tensor
    probs: Tensor
    vocabulary: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "TopProbs":
        """The probabilities on a device in a dtype, the words on the device."""
        return TopProbs(self.words.to(device), self.probs.to(device, dtype), self.vocabulary)

    def of(self, tokens: Tensor) -> "TopProbs":
        """Those of some tokens, shape ``(m,)``, int64."""
        return TopProbs(self.words[tokens], self.probs[tokens], self.vocabulary)

    def share(self) -> Tensor:
        """The probability of each word that is not listed, shape ``(n,)``."""
        unlisted = self.vocabulary - self.words.size(1)
        if unlisted == 0:
            return self.probs.new_zeros(self.probs.size(0))
        return (1 - self.probs.sum(1)).clamp_(min=0) / unlisted

    def dense(self) -> Tensor:
        """The probability of every word, shape ``(n, V)``."""
        every = self.share().unsqueeze(1).repeat(1, self.vocabulary)
        return every.scatter_(1, self.words, self.probs)

    def entropy(self) -> Tensor:
        """Of each distribution, shape ``(n,)``, nats."""
        share = self.share()
        unlisted = self.vocabulary - self.words.size(1)
        return -torch.xlogy(self.probs, self.probs).sum(1) - unlisted * torch.xlogy(share, share)


@torch.inference_mode()
def top_probs(
    teachers: Union[Sequence[TeacherLogits], PartedLogits], k: int, temperature: float = 1.0, rows: Optional[int] = None
) -> TopProbs:
    """The `k` most probable words of each of n tokens, the most probable first.

    Args:
        teachers: each of the same n tokens, their probabilities averaged; or several for a part of the tokens each
        k: from 1 to V
        temperature: T of the softmax
        rows: tokens in a chunk; None: as measured to be fast
    """
    if isinstance(teachers, PartedLogits):
        parts = [top_probs(part, k, temperature, rows) for part, n in zip(teachers.parts, teachers.sizes) if n > 0]
        words, probs = torch.cat([part.words for part in parts]), torch.cat([part.probs for part in parts])
        words, probs = (torch.empty_like(x).index_copy_(0, teachers.order, x) for x in (words, probs))
        return TopProbs(words, probs, parts[0].vocabulary)
    first = teachers[0]
    projection = first.weight if isinstance(first, LinearLogits) else first.given.t()
    size = rows or chunk_rows(projection)
    chunks = TeacherChunks(teachers, temperature)
    found = [chunks.probs(start, stop).topk(k, dim=1) for start, stop in spans(0, first[0].size(0), size)]
    words, probs = torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])
    return TopProbs(words, probs, projection.size(0))


class ListedBlock(NamedTuple):
    """As :class:`~kd_ext.modules.chunked_logits.TeacherBlock`, but for what all words of a token share.

    Attributes:
        words: shape ``(rows, K)``, int64
        excess: how much more probable they are than a word that is not listed, shape ``(rows, K)``
        entropy: shape ``(rows,)``, nats
        scratch: shape ``(rows, V)``
    """

    words: Tensor
    excess: Tensor
    entropy: Tensor
    scratch: Tensor

    def expectation(self, values: Tensor) -> Tensor:
        """Of `values`, shape ``(rows, V)``, under the excess: shape ``(rows,)``."""
        return values.gather(1, self.words).mul_(self.excess).sum(1)

    def subtract_from(self, values: Tensor, factor: float) -> None:
        """``values -= factor * excess``"""
        values.scatter_add_(1, self.words, self.excess * -factor)


class ListedChunks:
    """What :class:`~kd_ext.modules.chunked_logits.TeacherChunks` is for logits; nothing has to be computed.

    Attributes:
        share: what all words of a token have in common, shape ``(m,)``
    """

    def __init__(self, listed: TopProbs) -> None:
        self.share = listed.share()
        self._words = listed.words
        self._excess = listed.probs - self.share.unsqueeze(1)
        self._entropy = listed.entropy()
        self._start = 0

    def load(self, start: int, stop: int) -> None:
        """The next blocks are of the tokens from `start` on."""
        self._start = start

    @property
    def fits_row_kernel(self) -> bool:
        """Whether the kernel of a row takes what :meth:`of_rows` gives: it holds all words of a row at once."""
        return self._words.size(1) <= LONGEST_LIST

    def of_rows(self, start: int, stop: int) -> Dict[str, Any]:
        """The words of some tokens, for that kernel."""
        return {"listed": (self._words[start:stop], self._excess[start:stop])}

    def entropy(self, start: int, stop: int) -> Tensor:
        """Of some tokens' distributions, shape ``(stop - start,)``, nats."""
        return self._entropy[start:stop]

    def block(self, rows: slice, scratch: Tensor) -> ListedBlock:
        """Some rows of the chunk, the scratch as it was given."""
        at = slice(self._start + rows.start, self._start + rows.stop)
        return ListedBlock(self._words[at], self._excess[at], self._entropy[at], scratch)

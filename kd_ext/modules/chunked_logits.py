"""Logits that are computed a chunk of tokens at a time, into memory that is used again."""

import functools
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
# Tokens in a chunk on a CPU: with fewer, reading the projection costs more than multiplying by it; with more, the
# products are no faster (measured at 32k words: 64 rows take 1.8 times as long as 256, 512 as long as 256).
CHUNK_ROWS = 256
# Tokens in a chunk on an accelerator, and words times tokens where words are few: products are slow with fewer, and
# memory grows with them.
ACCELERATOR_ROWS, ACCELERATOR_ELEMENTS = 1024, 2**24
# What one thread of a CPU works on at a time, so that after the first operation the rest find it in its cache. With
# two idle cores and 32k words, 2**16 to 2**18 are alike, and a whole chunk at once takes 5 % longer. The threads meet
# after every block, which costs far more where other processes keep the cores busy: hence the largest of the three.
BLOCK_ELEMENTS = 2**18


class LinearLogits(NamedTuple):
    """Logits that have not been computed: ``features @ weight.T + bias``.

    Attributes:
        features: shape ``(n, d)``
        weight: shape ``(V, d)``, the dtype of the features
        bias: shape ``(V,)`` or None
    """

    features: Tensor
    weight: Tensor
    bias: Optional[Tensor] = None

    def logits(self) -> Tensor:
        """All of them, shape ``(n, V)``."""
        return F.linear(self.features, self.weight, self.bias)

    def of(self, tokens: Tensor) -> "LinearLogits":
        """Those of some tokens, shape ``(m,)``, int64."""
        return self._replace(features=self.features[tokens])

    def first_words(self, vocabulary: Optional[int]) -> "LinearLogits":
        """Those of the first words, or of all; the same object where there are no more."""
        if vocabulary is None or vocabulary >= self.weight.size(0):
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return LinearLogits(self.features, self.weight[:vocabulary], bias)

    def as_autocast(self) -> "LinearLogits":
        """The same in the dtype in which automatic mixed precision would multiply them."""
        dtype = _autocast_dtype() if self.features.is_cuda else None
        if dtype is None:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return LinearLogits(self.features.to(dtype), self.weight.to(dtype), bias)


class GivenLogits(NamedTuple):
    """Logits that are there, up to a constant in each row, as log-probabilities are: shape ``(n, V)``."""

    given: Tensor

    def logits(self) -> Tensor:
        return self.given

    def of(self, tokens: Tensor) -> "GivenLogits":
        """Those of some tokens, shape ``(m,)``, int64."""
        return GivenLogits(self.given[tokens])

    def first_words(self, vocabulary: Optional[int]) -> "GivenLogits":
        """Those of the first words, or of all; the same object where there are no more."""
        if vocabulary is None or vocabulary >= self.given.size(1):
            return self
        return GivenLogits(self.given[:, :vocabulary])

    def as_autocast(self) -> "GivenLogits":
        """They are not multiplied."""
        return self


TeacherLogits = Union[LinearLogits, GivenLogits]


def _autocast_dtype() -> Optional[torch.dtype]:
    if hasattr(torch, "get_autocast_dtype"):  # torch >= 2.4, whose later versions warn of the older names
        return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def spans(start: int, stop: int, size: int) -> Iterator[Tuple[int, int]]:
    """``start`` to ``stop`` in pieces of at most `size`."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def chunk_rows(weight: Tensor) -> int:
    """How many tokens are projected at once by `weight`, shape ``(V, d)``."""
    if weight.is_cuda:
        return max(ACCELERATOR_ROWS, ACCELERATOR_ELEMENTS // weight.size(0))
    return CHUNK_ROWS


def row_kernel_for(like: Tensor) -> Any:
    """The module :mod:`~kd_ext.modules.row_kernel`, if it can be used on tensors of this device and dtype, or None."""
    if like.device.type != "cuda" or like.dtype != torch.float32:
        return None
    return _row_kernel()


@functools.lru_cache(maxsize=None)
def _row_kernel() -> Any:
    try:
        from kd_ext.modules import row_kernel
    except ImportError:  # Triton is not everywhere where there is a GPU
        return None
    return row_kernel


def blocks(chunk: Tensor) -> Iterator[slice]:
    """The rows of a chunk in blocks that the caches of a CPU hold; an accelerator takes them all at once."""
    size = chunk.size(0)
    if not chunk.is_cuda:
        size = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // chunk.size(1))
    for start, stop in spans(0, chunk.size(0), size):
        yield slice(start, stop)


class Product:
    """Matrix products of a model's tensors, accumulated and returned in float32 (float64 for float64).

    Half-precision operands stay as they are where the device multiplies them into float32; elsewhere they are
    converted before.

    Args:
        like: a tensor of the model

    Attributes:
        dtype: of the results
        operand: of what is multiplied
    """

    def __init__(self, like: Tensor) -> None:
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        is_half = like.dtype in (torch.float16, torch.bfloat16)
        self._mixed = like.is_cuda and is_half and _TORCH >= (2, 8)
        self.operand = like.dtype if self._mixed else self.dtype

    def into(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``out = a @ b``"""
        return torch.mm(a, b, out_dtype=self.dtype, out=out) if self._mixed else torch.mm(a, b, out=out)

    def add(self, out: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
        """``out += factor * a @ b``"""
        if not self._mixed:
            out.addmm_(a, b, alpha=factor)
        elif _TORCH >= (2, 11):  # before, what is added to had to be of the operands' dtype
            torch.addmm(out, a, b, out_dtype=self.dtype, alpha=factor, out=out)
        else:
            out.add_(torch.mm(a, b, out_dtype=self.dtype), alpha=factor)


class LogitChunks:
    """A model's logits, a chunk at a time, each chunk in the memory of the one before.

    Args:
        logits: of n tokens

    Attributes:
        features: shape ``(n, d)``, as they are multiplied
        weight: shape ``(V, d)``, as it is multiplied
    """

    def __init__(self, logits: TeacherLogits) -> None:
        self._given: Optional[Tensor] = None
        self._buffer: Optional[Tensor] = None
        if isinstance(logits, GivenLogits):
            self.product = Product(logits.given)
            self._given = logits.given
            return
        self.product = product = Product(logits.features)
        self.features, self.weight = (x.detach().to(product.operand) for x in (logits.features, logits.weight))
        self._bias = None if logits.bias is None else logits.bias.detach().to(product.dtype)

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits of some tokens, shape ``(stop - start, V)``, to be overwritten by whoever asks for them."""
        if self._given is not None:
            return self._given[start:stop].to(self.product.dtype, copy=True)
        if self._buffer is None or self._buffer.size(0) < stop - start:
            shape = (stop - start, self.weight.size(0))
            self._buffer = torch.empty(shape, dtype=self.product.dtype, device=self.weight.device)
        logits = self._buffer[: stop - start]
        self.product.into(logits, self.features[start:stop], self.weight.t())
        return logits if self._bias is None else logits.add_(self._bias)

    def free(self) -> None:
        """Give the chunks' memory back."""
        self._buffer = None


class TeacherBlock(NamedTuple):
    """The teacher's side of some tokens.

    Attributes:
        probs: shape ``(rows, V)``
        entropy: of the probabilities, shape ``(rows,)``, nats
        scratch: shape ``(rows, V)``, of no more use to the teacher
    """

    probs: Tensor
    entropy: Tensor
    scratch: Tensor

    def expectation(self, values: Tensor) -> Tensor:
        """Of `values`, shape ``(rows, V)``, under the probabilities: shape ``(rows,)``. Uses the scratch."""
        return torch.mul(values, self.probs, out=self.scratch).sum(1)

    def subtract_from(self, values: Tensor, factor: float) -> None:
        """``values -= factor * probs``"""
        values.sub_(self.probs, alpha=factor)


class TeacherChunks:
    """Probabilities of one teacher, or their mean over several, a chunk and then a block at a time.

    Args:
        teachers: each of the same m tokens
        temperature: T of the softmax

    Attributes:
        share: what all words of a token have in common: nothing is known to be
    """

    share: Optional[Tensor] = None

    def __init__(self, teachers: Sequence[TeacherLogits], temperature: float) -> None:
        self._sources = [LogitChunks(teacher) for teacher in teachers]
        self._temperature = temperature
        self._chunk: Optional[Tensor] = None  # logits, of several teachers probabilities

    def load(self, start: int, stop: int) -> None:
        """Compute the chunk of the tokens from `start` to `stop`."""
        if len(self._sources) == 1:
            self._chunk = self._sources[0].rows(start, stop)
            return
        parts: List[Tensor] = []
        for source in self._sources:
            logits = source.rows(start, stop)
            for block in blocks(logits):
                self._softmax(logits[block], out=logits[block])
            if parts:
                parts[0].add_(logits)
            else:
                parts.append(logits.clone())
        self._chunk = parts[0].div_(len(self._sources))

    def probs(self, start: int, stop: int) -> Tensor:
        """The probabilities of the tokens from `start` to `stop`, shape ``(stop - start, V)``, until the next call."""
        self.load(start, stop)
        assert self._chunk is not None
        if len(self._sources) == 1:
            for block in blocks(self._chunk):
                self._softmax(self._chunk[block], out=self._chunk[block])
        return self._chunk

    @property
    def fits_row_kernel(self) -> bool:
        """Whether the kernel of a row takes what :meth:`of_rows` gives."""
        return len(self._sources) <= 1

    def of_rows(self, start: int, stop: int) -> Dict[str, Any]:
        """The chunk that was loaded, for that kernel."""
        return {"teacher": self._chunk}

    def block(self, rows: slice, scratch: Tensor) -> TeacherBlock:
        """Some rows of the chunk, once each: its memory is used.

        Args:
            rows: within the chunk
            scratch: shape ``(rows, V)``
        """
        assert self._chunk is not None
        values = self._chunk[rows]
        if len(self._sources) > 1:
            tiny = torch.finfo(values.dtype).tiny  # 0 log 0 = 0
            torch.clamp(values, min=tiny, out=scratch).log_().mul_(values)
            return TeacherBlock(values, -scratch.sum(1), scratch)
        total = self._softmax(values, out=scratch)
        # values are now log-probabilities but for log(total), of an impossible word -inf: 0 log 0 = 0
        values.clamp_(min=torch.finfo(values.dtype).min)
        entropy = total.log_() - values.mul_(scratch).sum(1)
        return TeacherBlock(scratch, entropy, values)

    def _softmax(self, logits: Tensor, out: Tensor) -> Tensor:
        """Write the softmax at T into `out`; shift and divide `logits`. Returns what their exponentials sum to."""
        logits.sub_(logits.amax(1, keepdim=True))
        if self._temperature != 1:
            logits.div_(self._temperature)
        total = torch.exp(logits, out=out).sum(1)
        out.mul_(total.reciprocal().unsqueeze(1))
        return total

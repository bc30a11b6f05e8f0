"""A FIFO queue of numbers, one per token, whose newest entries can be taken back."""

from fractions import Fraction
from math import ceil
from typing import List, NamedTuple

import torch
from torch import Tensor

from kd_ext.modules.running_rank import RunningRank


def selection_size(rate: float, pool: int) -> int:
    """``ceil(rate * pool)`` for the decimal number that `rate` prints as.

    In floating point 0.07 * 100 is a little over 7, and would select 8.
    """
    return ceil(Fraction(repr(rate)) * pool)


class _Undo(NamedTuple):
    slots: Tensor
    overwritten: Tensor
    start: int
    size: int


class TokenQueue:
    """The newest `capacity` values that were pushed, never more.

    A push counts at once, but stays provisional until :meth:`commit`; :meth:`rollback` takes back what was pushed
    since, as if it had never been: an update that the optimizer skips leaves no trace.

    Args:
        capacity: in values (tokens), at least 1
        dtype: in which the values are kept
    """

    def __init__(self, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        self.capacity = capacity
        self._ring = torch.empty(0, dtype=dtype)
        self._start = 0  # the slot that the next value goes to
        self._size = 0
        self._undo: List[_Undo] = []
        self._kth_largest = RunningRank()

    def __len__(self) -> int:
        return self._size

    def push(self, values: Tensor) -> None:
        """Append `values`, oldest first; the oldest entries beyond the capacity are dropped.

        Args:
            values: shape ``(n,)``, any dtype; of more than `capacity` the newest stay
        """
        values = values.detach().to(self._ring.dtype)[-self.capacity :]
        if self._ring.numel() == 0:
            self._ring = values.new_empty(self.capacity)
        elif self._ring.device != values.device:
            self._ring = self._ring.to(values.device)
        n = values.numel()
        slots = torch.arange(self._start, self._start + n, device=values.device) % self.capacity
        self._undo.append(_Undo(slots, self._ring[slots], self._start, self._size))
        self._ring[slots] = values
        self._start = (self._start + n) % self.capacity
        self._size = min(self._size + n, self.capacity)

    def gate(self, rate: float) -> Tensor:
        """The ``ceil(rate * len)``-th largest value, as a scalar tensor; the queue must not be empty."""
        return self._kth_largest(self.unordered(), selection_size(rate, self._size))

    def unordered(self) -> Tensor:
        """The content, shape ``(len,)``, in no order; not a copy."""
        return self._ring[: self._size]

    def commit(self) -> None:
        """Make the pushes so far final."""
        self._undo.clear()

    def rollback(self) -> None:
        """Undo every push since the last commit."""
        while self._undo:
            slots, overwritten, self._start, self._size = self._undo.pop()
            self._ring[slots.to(self._ring.device)] = overwritten.to(self._ring.device)

    def values(self) -> Tensor:
        """A copy of the content, shape ``(len,)``, oldest first."""
        if self._size < self.capacity:
            return self._ring[: self._size].clone()
        return self._ring.roll(-self._start)

    @classmethod
    def from_values(cls, capacity: int, values: Tensor) -> "TokenQueue":
        """A queue that holds the newest `capacity` of `values`, shape ``(n,)``, in their dtype."""
        queue = cls(capacity, values.dtype)
        queue.push(values)
        queue.commit()
        return queue

"""The k-th largest of many values that change little between one question and the next."""

from typing import Optional, Tuple

import numpy as np
import torch
from torch import Tensor

# Of all values, the share on either side of the answer that the window takes in
MARGIN = 1 / 64


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The `k`-th largest of `values`; NaN counts as larger than any number.

    Args:
        values: shape ``(n,)``, not empty
        k: from 1 to n

    Returns:
        a scalar tensor on the values' device; nothing waits for it
    """
    if values.is_cuda:  # kthvalue has one block of threads for a vector, sort has all
        return values.sort().values[-k]
    return values.kthvalue(values.numel() - k + 1).values


class RunningRank:
    """:func:`kth_largest` for the content of a queue.

    On a CPU the window of values around the last answer is kept. Counting what is above it, and searching what is
    inside, takes a tenth of the time of a search among all values. The answer is exact: where it is not in the window,
    all values are searched, and the window is drawn anew.
    """

    def __init__(self) -> None:
        self._window: Optional[Tuple[np.floating, np.floating]] = None

    def __call__(self, values: Tensor, k: int) -> Tensor:
        """As :func:`kth_largest`."""
        if values.device.type != "cpu":
            return kth_largest(values, k)
        array = values.numpy()
        found = self._inside(array, k)
        if found is None:
            found = self._among_all(array, k)
        return torch.tensor(found, dtype=values.dtype)

    def _inside(self, array: np.ndarray, k: int) -> Optional[np.floating]:
        if self._window is None:
            return None
        low, high = self._window
        above = array.size - np.count_nonzero(array <= high)  # NaN is
        inside = array[(array >= low) & (array <= high)]
        rank = k - above
        return np.partition(inside, inside.size - rank)[-rank] if 0 < rank <= inside.size else None

    def _among_all(self, array: np.ndarray, k: int) -> np.floating:
        place, margin = array.size - k, int(MARGIN * array.size)
        low, high = max(place - margin, 0), min(place + margin, array.size - 1)
        ordered = np.partition(array, sorted({low, place, high}))
        self._window = ordered[low], ordered[high]
        return ordered[place]

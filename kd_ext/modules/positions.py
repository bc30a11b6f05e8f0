"""Some positions of a batch, as places in its flattened tensors."""

from typing import Callable, Optional

import torch
from torch import Tensor


def true_first(mask: Tensor) -> Tensor:
    """The places where `mask`, shape ``(n,)``, bool, is true, then the others: shape ``(n,)``, int64.

    ``nonzero`` would have to wait for a GPU, as it does not know how many there are.
    """
    return torch.sort((~mask).byte(), stable=True).indices


class Positions:
    """Where a mask is true.

    Args:
        mask: shape ``(B, T)``, bool, with n true
        count: gives n; None: it is counted, for which a GPU has to be waited for
    """

    def __init__(self, mask: Tensor, count: Optional[Callable[[], int]] = None) -> None:
        self.mask = mask
        self._count = count
        self._indices: Optional[Tensor] = None

    def count(self) -> int:
        """n"""
        return self._count() if self._count is not None else int(self.mask.sum())

    def take(self, values: Tensor) -> Tensor:
        """From shape ``(B, T, ...)`` to ``(n, ...)``, in the order of rows.

        n is asked for here: on a GPU, whoever gives it work before has it wait for nobody.
        """
        # not by the mask: the gradient of that is made by sorting
        return values.flatten(0, 1).index_select(0, self._places())

    def _places(self) -> Tensor:
        if self._indices is None:
            with torch.inference_mode(False):  # a teacher may ask first; autograd keeps ordinary tensors alone
                flat = self.mask.flatten()
                if self._count is None or not flat.is_cuda:
                    self._indices = flat.nonzero().squeeze(1)
                else:
                    self._indices = true_first(flat)[: self._count()]
        return self._indices

"""The workers of a run, and what each of them has to say to all."""

from typing import Any, Optional, Sequence

import torch
from torch import Tensor
from torch import distributed as dist


class Workers:
    """Those of a process group, in the order of their ranks.

    Args:
        group: None: this process alone
    """

    def __init__(self, group: Optional[Any] = None) -> None:
        self._group = group
        self.rank: int = 0 if group is None else dist.get_rank(group)
        self._count: int = 1 if group is None else dist.get_world_size(group)

    def stack(self, values: Tensor) -> Tensor:
        """The `values` of W workers, shape ``(k,)`` on each, as one tensor of shape ``(W, k)``."""
        return torch.stack(self._gather(values)) if self._group is not None else values.unsqueeze(0)

    def concat(self, values: Tensor, lengths: Sequence[int]) -> Tensor:
        """The `values` of all workers, one after the other.

        Args:
            values: shape ``(n,)``; n may differ between the workers and be 0, the dtype may not
            lengths: n of each worker

        Returns:
            shape ``(sum of n,)``, the same on every worker
        """
        if self._group is None:
            return values
        # all_gather wants equal shapes: pad to the longest, cut again
        padded = values.new_zeros(max(lengths))
        padded[: values.numel()] = values
        return torch.cat([part[:n] for part, n in zip(self._gather(padded), lengths)])

    def _gather(self, values: Tensor) -> "list[Tensor]":
        parts = [torch.empty_like(values) for _ in range(self._count)]
        dist.all_gather(parts, values.detach(), group=self._group)
        return parts

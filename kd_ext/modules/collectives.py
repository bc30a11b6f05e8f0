"""Joining the workers' tensors."""

from typing import Any, Optional

import torch
from torch import Tensor
from torch import distributed as dist


def all_gather_concat(values: Tensor, group: Optional[Any] = None) -> Tensor:
    """The `values` of all workers, in rank order.

    Args:
        values: shape ``(n,)``; n may differ between the workers and be 0, the dtype may not
        group: the process group; None: this process alone

    Returns:
        shape ``(sum of n,)``, the same on every worker
    """
    if group is None:
        return values
    values = values.detach()
    workers = dist.get_world_size(group)
    length = torch.tensor([values.numel()], device=values.device)
    lengths = [torch.zeros_like(length) for _ in range(workers)]
    dist.all_gather(lengths, length, group=group)
    counts = torch.cat(lengths).tolist()
    # all_gather wants equal shapes: pad to the longest, cut again
    padded = values.new_zeros(max(counts))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in range(workers)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])

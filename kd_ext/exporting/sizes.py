"""What a model costs on a disk and in memory."""

import os
from typing import List, Tuple

from torch import nn


def of_path(path: str) -> int:
    """Bytes of a file, or of all files in a folder."""
    if os.path.isdir(path):
        return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
    return os.path.getsize(path)


def of_model(model: nn.Module) -> int:
    """Bytes of a model's parameters in memory, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def table(rows: List[Tuple[str, int, int]]) -> List[str]:
    """Lines of a table: name, megabytes on the disk, megabytes in memory."""
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}  {'on disk':>10}  {'in memory':>10}"]
    return lines + [f"{name:{width}}  {disk / 1e6:7.2f} MB  {memory / 1e6:7.2f} MB" for name, disk, memory in rows]

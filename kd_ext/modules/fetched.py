"""Numbers that the CPU has to know, on their way from a device."""

from typing import List, Optional

import torch
from torch import Tensor


class Fetched:
    """A few whole numbers, copied while the device goes on.

    On a GPU the copy begins at once, behind what the GPU has been given so far. Whoever gives it more work before
    asking for the numbers waits for the copy alone, and the GPU waits for nobody.

    Args:
        numbers: shape ``(k,)``, any integer dtype
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._copied: Optional[torch.cuda.Event] = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> List[int]:
        """The numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()

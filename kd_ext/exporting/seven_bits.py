"""int8 weights that no CPU's product saturates.

A CPU without VNNI adds two products of an unsigned and a signed byte in 16 bits, and cuts off what is beyond 32,767.
With weights of 7 bits, at most 63, the sum is 2 * 255 * 63 = 32,130 at most.
"""

from typing import Any, Iterator, Tuple

import numpy as np
import torch

LARGEST = 63


def quantized_rows(weight: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """A matrix as whole numbers from -63 to 63, each row with a scale of its own.

    Args:
        weight: shape ``(n, m)``, floating

    Returns:
        int8, shape ``(n, m)``, and float32 scales, shape ``(n,)``: a weight times its row's scale is the number
    """
    largest = np.abs(weight).max(axis=1).astype(np.float64)
    largest[largest == 0] = LARGEST
    # as CTranslate2 does: no scale is more than float32 holds
    scale = np.minimum(LARGEST / largest, np.finfo(np.float32).max)
    return np.rint(weight * scale[:, None]).astype(np.int8), scale.astype(np.float32)


def quantize(spec: Any, rest: torch.dtype) -> None:
    """Quantize the weights that CTranslate2 would, and give all others the dtype `rest`.

    Args:
        spec: a specification of CTranslate2 with its weights in float32, not validated yet
    """
    for part, name, value in list(_arrays(spec)):
        if hasattr(part, f"{name}_scale"):
            weight, scale = quantized_rows(value)
            setattr(part, name, weight)
            setattr(part, f"{name}_scale", scale)
        else:
            setattr(part, name, torch.from_numpy(value).to(rest))


def _arrays(part: Any) -> Iterator[Tuple[Any, str, np.ndarray]]:
    """Each array in a specification: what it is of, its name there, and itself."""
    for name, value in vars(part).items():
        if name.startswith("_"):
            continue
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, np.ndarray) and inner.ndim:
                yield part, name, inner
            elif hasattr(inner, "__dict__"):
                yield from _arrays(inner)

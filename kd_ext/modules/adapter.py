"""Bottleneck adapters (Bapna and Firat, 2019: Simple, Scalable Adaptation for Neural Machine Translation)."""

import re
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: Dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

_PARAMETER = re.compile(r"(encoder|decoder)\.layers\.\d+\.adapters\.([^.]+)\.")


def adapter_of(parameter: str) -> Optional[Tuple[str, str]]:
    """The side and the id of the adapter that a parameter belongs to, by its name; None for any other."""
    match = _PARAMETER.match(parameter)
    return (match.group(1), match.group(2)) if match else None


class Adapter(nn.Module):
    """Layer norm, down, activation, up, gate, dropout, residual.

    The up-projection starts at zero: a new adapter is the identity, to the last bit.

    Args:
        dim: d, the model's width
        bottleneck_dim: h, the width between the projections
        activation: a key of :data:`ACTIVATIONS`
        dropout: drops elements of what is added to the residual
        gated: multiply what is added by a number in (0, 1) that each token computes from itself
    """

    def __init__(self, dim: int, bottleneck_dim: int, activation: str, dropout: nn.Module, gated: bool) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, bottleneck_dim)
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(bottleneck_dim, dim)
        self.gate = nn.Linear(dim, 1) if gated else None
        self.dropout = dropout
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Adapt each token by itself.

        Args:
            x: shape ``(..., d)``, any floating dtype

        Returns:
            the same shape and dtype
        """
        normed = self.layer_norm(x)
        added = self.up(self.activation(self.down(normed)))  # ... x d
        if self.gate is not None:
            added = torch.sigmoid(self.gate(normed)) * added  # ... x 1 times ... x d
        return x + self.dropout(added)


class AdapterSet(nn.Module):
    """The adapters behind one layer, by id; at most one of them is active.

    Args:
        adapters: id and adapter, in order
        active: the id to use; None: the set is the identity
    """

    def __init__(self, adapters: Iterable[Tuple[str, Adapter]], active: Optional[str]) -> None:
        super().__init__()
        self.active = active
        # not by add_module: it refuses names that a module has as attributes, and "to" is a language (Tongan)
        self._modules.update(adapters)

    @property
    def ids(self) -> List[str]:
        return list(self._modules)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the active adapter to `x`, shape ``(..., d)``."""
        if self.active is None:
            return x
        adapter = self._modules[self.active]
        assert adapter is not None
        return adapter(x)

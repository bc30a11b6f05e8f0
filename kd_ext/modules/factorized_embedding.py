"""Embeddings in two factors (Lan et al., 2020: ALBERT), and the output projections that go with them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_ext.modules.chunked_logits import LinearLogits


class FactorizedEmbedding(nn.Module):
    """A table of V x k, then a projection of k x d without bias.

    The initial scale gives each element of an embedding the variance 1 / d, so that sqrt(d) times it has unit
    variance, as in fairseq's own embeddings.

    Args:
        num_embeddings: V
        factor_dim: k, less than d
        embedding_dim: d
        padding_idx: the word whose embedding is zero and stays so
    """

    def __init__(self, num_embeddings: int, factor_dim: int, embedding_dim: int, padding_idx: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.weight = nn.Parameter(torch.empty(num_embeddings, factor_dim))
        self.up = nn.Linear(factor_dim, embedding_dim, bias=False)
        nn.init.normal_(self.weight, std=factor_dim**-0.5)
        nn.init.zeros_(self.weight[padding_idx])
        nn.init.normal_(self.up.weight, std=embedding_dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed `tokens`.

        Args:
            tokens: vocabulary ids, any shape, int64

        Returns:
            shape ``tokens.shape + (d,)``
        """
        return self.up(F.embedding(tokens, self.weight, self.padding_idx))


class TiedFactorizedProjection(nn.Module):
    """Logits ``(x W_up) E^T`` with the factors of an embedding: k (d + V) multiplications a token, not d V.

    It has no parameters of its own: the embedding's are not registered, counted or saved again here.
    """

    def __init__(self, embedding: FactorizedEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, out of sight of nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """From features, shape ``(..., d)``, to logits, shape ``(..., V)``."""
        return self.linear_logits(x).logits()

    def linear_logits(self, x: Tensor) -> LinearLogits:
        """The same, the product with the V x k factor left for later."""
        (embedding,) = self._embedding
        return LinearLogits(F.linear(x, embedding.up.weight.t()), embedding.weight)


class FactorizedProjection(nn.Module):
    """An output projection in two factors of its own: d x k, then k x V, no bias.

    Args:
        dim: d, the width of the features
        factor_dim: k
        num_embeddings: V
    """

    def __init__(self, dim: int, factor_dim: int, num_embeddings: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, factor_dim, bias=False)
        self.weight = nn.Parameter(torch.empty(num_embeddings, factor_dim))
        nn.init.normal_(self.down.weight, std=dim**-0.5)
        nn.init.normal_(self.weight, std=factor_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """From features, shape ``(..., d)``, to logits, shape ``(..., V)``."""
        return self.linear_logits(x).logits()

    def linear_logits(self, x: Tensor) -> LinearLogits:
        """The same, the product with the V x k factor left for later."""
        return LinearLogits(self.down(x), self.weight)

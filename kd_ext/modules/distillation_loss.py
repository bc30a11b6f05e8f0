"""The distillation term, and the label-smoothed term beside it, per token."""

from typing import NamedTuple, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F


def label_smoothed_nll(log_probs: Tensor, target: Tensor, epsilon: float) -> Tuple[Tensor, Tensor]:
    """Label-smoothed cross-entropy (Szegedy et al., 2016) in fairseq's form.

    The target word has probability 1 - epsilon, every other word epsilon / (V - 1).

    Args:
        log_probs: of the student, shape ``(n, V)``, float32
        target: shape ``(n,)``, int64
        epsilon: in [0, 1)

    Returns:
        the smoothed and the plain negative log-likelihood, each of shape ``(n,)``, nats
    """
    nll = -log_probs.gather(1, target.unsqueeze(1)).squeeze(1)
    if epsilon == 0:
        return nll, nll
    epsilon_i = epsilon / (log_probs.size(1) - 1)
    smoothed = (1 - epsilon - epsilon_i) * nll - epsilon_i * log_probs.sum(1)
    return smoothed, nll


class DistillationTerm(NamedTuple):
    """The distillation loss of ``n`` tokens, each of shape ``(n,)``, nats, times T^2.

    Attributes:
        cross_entropy: -sum_v q_v log p_v
        kl: the same less the teacher's entropy; detached, for logging
    """

    cross_entropy: Tensor
    kl: Tensor


def distillation_term(log_probs: Tensor, teacher_probs: Tensor, temperature: float = 1.0) -> DistillationTerm:
    """Cross-entropy of the student against the teacher (Hinton et al., 2015; Kim and Rush, 2016).

    Args:
        log_probs: of the student at temperature 1, shape ``(n, V)``, float32
        teacher_probs: at `temperature`, shape ``(n, V)``, float32
        temperature: T, of the student's softmax; the term is multiplied by T^2
    """
    student = at_temperature(log_probs, temperature)
    cross_entropy = -(teacher_probs * student).sum(1)
    entropy = -torch.xlogy(teacher_probs, teacher_probs).sum(1)
    scale = temperature**2
    return DistillationTerm(cross_entropy * scale, (cross_entropy.detach() - entropy) * scale)


def at_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """``log softmax(logits / T)`` from ``log softmax(logits)``: they differ by a constant, which softmax removes.

    Args:
        log_probs: shape ``(n, V)``
        temperature: T > 0
    """
    return log_probs if temperature == 1 else F.log_softmax(log_probs / temperature, dim=1)

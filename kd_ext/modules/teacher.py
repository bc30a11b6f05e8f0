"""A frozen teacher, or an ensemble of them."""

import logging
from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor, nn

from kd_ext.modules.distillation_loss import at_temperature

logger = logging.getLogger(__name__)


class Teacher:
    """Models that are only ever asked for probabilities.

    Not a module, so that whoever owns it neither saves nor trains its weights.

    Args:
        models: encoder-decoders with ``get_normalized_probs``; their vocabularies are the student's
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models: List[Any] = [model.eval().requires_grad_(False) for model in models]
        self._placed = False

    def place_like(self, student: nn.Module) -> None:
        """Move the weights to the student's device and dtype; a no-op when they are there."""
        if self._placed:
            return
        parameter = next(student.parameters())
        for model in self.models:
            model.to(device=parameter.device, dtype=parameter.dtype)
        logger.info("teacher placed on %s as %s", parameter.device, parameter.dtype)
        self._placed = True

    def probs(self, net_input: Dict[str, Any], rows: Tensor, temperature: float = 1.0) -> Tensor:
        """The probabilities of every word at the chosen target positions, averaged over the ensemble.

        Args:
            net_input: the arguments of the models' forward
            rows: the positions, shape ``(B, T)``, bool, with n true
            temperature: T of the softmax

        Returns:
            shape ``(n, V)``, float32, without gradient
        """
        total = None
        for model in self.models:
            with torch.inference_mode():
                log_probs = model.get_normalized_probs(model(**net_input), log_probs=True)
            # outside of inference mode: what autograd is to keep must be an ordinary tensor
            probs = at_temperature(log_probs[rows].float(), temperature).exp()
            total = probs if total is None else total + probs
        assert total is not None
        return total / len(self.models)

"""A frozen teacher, or an ensemble of them."""

import logging
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_ext.modules.chunked_logits import GivenLogits, LinearLogits, TeacherLogits
from kd_ext.modules.compiled_layers import compile_layers
from kd_ext.modules.input_format import InputFormat
from kd_ext.modules.positions import Positions

logger = logging.getLogger(__name__)

_LOOKED_AT = 256  # tokens

# from the features of n target positions, shape ``(n, d)``, to their logits
Projection = Callable[[Tensor], LinearLogits]


class Teacher:
    """Models that are only ever asked for probabilities.

    Not a module, so that whoever owns it neither saves nor trains its weights.

    Args:
        models: encoder-decoders with ``get_normalized_probs``; their vocabularies are the student's
        projections: of each model that gives features by ``features_only=True``, its output projection; None for one
            that must be asked for the probabilities of all positions
        identity: what tells it from other teachers
        formats: how each model is asked; None: as the student is
        vocabulary: V; what a model has more than the student's words, at the end of its own, gets no probability
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        projections: Optional[Sequence[Optional[Projection]]] = None,
        identity: str = "",
        formats: Optional[Sequence[Optional[InputFormat]]] = None,
        vocabulary: Optional[int] = None,
    ) -> None:
        self.identity = identity
        self.models: List[Any] = [model.eval().requires_grad_(False) for model in models]
        self._projections = projections or [None] * len(self.models)
        self.formats = formats or [None] * len(self.models)
        self._vocabulary = vocabulary
        self._has_said_cut = False
        self._placed = False

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights to a device and a dtype; a no-op when they are there."""
        if self._placed:
            return
        for model in self.models:
            model.to(device=device, dtype=dtype)
        logger.info("teacher placed on %s as %s", device, dtype)
        self._placed = True

    def compile_layers(self) -> None:
        """Compile each model's layers, as :func:`~kd_ext.modules.compiled_layers.compile_layers`."""
        for model in self.models:
            compile_layers(model, gives_attention=False)

    @torch.inference_mode()
    def output(self, sample: Dict[str, Any], positions: Positions) -> List[TeacherLogits]:
        """The logits of each model at the chosen target positions.

        Args:
            sample: a batch; its ``net_input`` are the arguments of the models' forward
            positions: n of them, in a batch of shape ``(B, T)``

        Returns:
            for each model n tokens, not projected yet where that can be left for later
        """
        logits: List[TeacherLogits] = []
        for model, projection, layout in zip(self.models, self._projections, self.formats):
            net_input, asked = sample["net_input"], positions
            if layout is not None:
                net_input, asked = layout.apply(net_input, positions)
            if projection is not None:
                features, _ = model(**net_input, features_only=True)
                logits.append(self._cut(projection(asked.take(features))))
            else:
                log_probs = model.get_normalized_probs(model(**net_input), log_probs=True)
                logits.append(self._cut(GivenLogits(asked.take(log_probs))))
        self._has_said_cut = True
        return logits

    def _cut(self, logits: TeacherLogits) -> TeacherLogits:
        cut = logits.first_words(self._vocabulary)
        if cut is not logits and not self._has_said_cut:
            rows = logits[0]  # features or log-probabilities
            few = torch.arange(min(_LOOKED_AT, len(rows)), device=rows.device)
            kept = F.softmax(logits.of(few).logits().float(), dim=1)[:, : self._vocabulary].sum(1)
            logger.info(
                "of the teacher's probability %.2g is on words that the student does not have, and left out "
                "(mean of %d tokens of the first batch)",
                *(1 - kept.mean().item() if len(few) else 0.0, len(few)),
            )
        return cut

    def probs(self, sample: Dict[str, Any], positions: Positions, temperature: float = 1.0) -> Tensor:
        """The probabilities of every word at the chosen target positions, averaged over the ensemble.

        Args:
            sample: a batch; its ``net_input`` are the arguments of the models' forward
            positions: n of them, in a batch of shape ``(B, T)``
            temperature: T of the softmax

        Returns:
            shape ``(n, V)``, float32, without gradient
        """
        total = None
        for logits in self.output(sample, positions):
            with torch.inference_mode():
                scaled = logits.logits().float() / temperature
            # outside of inference mode: what autograd is to keep must be an ordinary tensor
            probs = F.softmax(scaled, dim=1)
            total = probs if total is None else total + probs
        assert total is not None
        return total / len(self.models)

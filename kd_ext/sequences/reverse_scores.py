"""How probable a source is as the translation of its translation, by a model of the reverse direction."""

import math
from typing import Any, List, Sequence

import torch
from fairseq.data import data_utils
from torch.nn import functional as F

from kd_ext.modules.chunked_logits import spans
from kd_ext.modules.positions import Positions
from kd_ext.modules.teacher import Teacher

_ROWS = 256  # tokens whose probabilities are in memory at once


class ReverseScores:
    """Log-probabilities a token, by a model that is asked as a teacher is.

    Args:
        teacher: of the reverse direction, placed on `device`
        words: the dictionary of its targets, which are the sources
    """

    def __init__(self, teacher: Teacher, words: Any, device: torch.device) -> None:
        self._teacher, self._words, self._device = teacher, words, device
        limits = zip(*(model.max_positions() for model in teacher.models))
        self._longest = [min(of_side) for of_side in limits]
        for layout in filter(None, teacher.formats):
            self._longest = [most - more for most, more in zip(self._longest, layout.added)]

    def takes(self, translation: List[int], source: List[int]) -> bool:
        """Whether neither is too long for the model; both without eos."""
        return len(translation) < self._longest[0] and len(source) < self._longest[1]

    def __call__(self, translations: Sequence[List[int]], sources: Sequence[List[int]]) -> List[float]:
        """The mean of log p(token) over each source's tokens and its eos, in bits; both without eos."""
        pad, eos = self._words.pad(), self._words.eos()

        def laid(rows: Sequence[List[int]], left: bool) -> torch.Tensor:
            return data_utils.collate_tokens([torch.tensor(row) for row in rows], pad, left_pad=left).to(self._device)

        asked = laid([[*row, eos] for row in translations], True)
        prev = laid([[eos, *row] for row in sources], False)
        target = laid([[*row, eos] for row in sources], False)
        net_input = {"src_tokens": asked, "src_lengths": asked.ne(pad).sum(1), "prev_output_tokens": prev}
        real = target.ne(pad)
        words = target[real]
        found = torch.zeros(len(words), device=self._device)
        outputs = self._teacher.output({"net_input": net_input}, Positions(real))
        with torch.inference_mode():
            for first, last in spans(0, len(words), _ROWS):
                rows = torch.arange(first, last, device=self._device)
                probs = sum(F.softmax(logits.of(rows).logits().float(), dim=1) for logits in outputs)
                chosen = (probs / len(outputs)).gather(1, words[first:last].unsqueeze(1))
                found[first:last] = chosen.squeeze(1).log()
            total = torch.zeros(real.shape, device=self._device).masked_scatter_(real, found).sum(1)
            return (total / real.sum(1) / math.log(2)).tolist()

"""An exported student, without fairseq and torch."""

from __future__ import annotations

from pathlib import Path
from typing import List

from pieces import MAX_PIECES

BEAM = 5


class Served:
    """Translates with CTranslate2 on one core.

    Args:
        folder: what ``python -m kd_ext.export --format ctranslate2`` wrote
    """

    def __init__(self, folder: Path) -> None:
        import ctranslate2

        self._translator = ctranslate2.Translator(str(folder), device="cpu", inter_threads=1, intra_threads=1)

    def __call__(self, lines: List[str], size: int = 32) -> List[str]:
        """The translations of lines of sentencepieces, as text."""
        found = self._translator.translate_batch(
            [line.split() for line in lines],
            beam_size=BEAM,
            max_batch_size=size,
            max_decoding_length=2 * MAX_PIECES,
            suppress_sequences=[["<blank>"]],  # padding, which fairseq never says
        )
        return ["".join(result.hypotheses[0]).replace("\u2581", " ").strip() for result in found]

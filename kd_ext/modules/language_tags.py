"""The language of a sentence, told by a tag among its tokens."""

from typing import Any, Collection, Dict, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from kd_ext.modules.tag_places import LEADING, SPECIAL, WORD


class LanguageTags:
    """The language of each sentence of a batch.

    Args:
        tags: the language that the word of an id names, in the order of the pools
        vocabulary: how many words there are
        specials: ids of symbols that are no words
        leading: ids of the words that stand at the beginning of sentences, before a tag or as one. A sentence's
            language is then the first tag in its run of such words, and else its last word if that is a tag. None: the
            first tag wherever it stands

    Attributes:
        pools: the languages, then ``untagged`` for sentences without a tag (with a ``_`` before it where that is the
            name of a language)
    """

    def __init__(
        self,
        tags: Mapping[int, str],
        vocabulary: int,
        specials: Collection[int] = (),
        leading: Optional[Collection[int]] = None,
    ) -> None:
        untagged = "untagged"
        while untagged in tags.values():
            untagged = f"_{untagged}"
        self.pools = [*tags.values(), untagged]
        languages = torch.full((vocabulary,), -1)  # vocabulary id -> pool, -1 for other words
        languages[list(tags)] = torch.arange(len(tags))
        kinds = torch.full((vocabulary,), WORD, dtype=torch.uint8)
        if leading is not None:
            kinds[list(leading)] = LEADING
        kinds[list(specials)] = SPECIAL
        self._is_anywhere = leading is None
        self._tables: Dict[torch.device, Tuple[Tensor, Tensor]] = {languages.device: (languages, kinds)}

    def __len__(self) -> int:
        """How many languages have a tag."""
        return len(self.pools) - 1

    def of_words(self) -> np.ndarray:
        """The language that each word of the vocabulary names, -1: none. Shape ``(V,)``, int64."""
        return next(iter(self._tables.values()))[0].cpu().numpy()

    def __getstate__(self) -> Dict[str, Any]:  # for processes that make batches
        on_cpu = {device: tables for device, tables in self._tables.items() if device.type == "cpu"}
        return {**self.__dict__, "_tables": on_cpu}

    def of_sentences(self, tokens: Tensor) -> Tensor:
        """The language of each sentence.

        Args:
            tokens: vocabulary ids, shape ``(B, S)``, padded on either side

        Returns:
            index into `pools`, shape ``(B,)``, int64
        """
        languages, kinds = self._on(tokens.device)
        found = languages[tokens]  # B x S
        is_tag = found >= 0
        if not self._is_anywhere:
            of_words = kinds[tokens]
            is_tag = is_tag & (of_words != WORD).long().cumprod(1).bool()
            # the last word: argmax gives the first of equals
            is_last = torch.zeros_like(is_tag).scatter_(1, _last(of_words != SPECIAL), True)
            is_tag = is_tag | (is_last & ~is_tag.any(1, keepdim=True))
        language = found.gather(1, is_tag.long().argmax(1, keepdim=True)).squeeze(1)
        return torch.where(is_tag.any(1) & (language >= 0), language, torch.full_like(language, len(self)))

    def _on(self, device: torch.device) -> Tuple[Tensor, Tensor]:
        if device not in self._tables:
            languages, kinds = next(iter(self._tables.values()))
            self._tables[device] = languages.to(device), kinds.to(device)
        return self._tables[device]


def _last(mask: Tensor) -> Tensor:
    """Where each row of `mask`, shape ``(B, S)``, is last true: shape ``(B, 1)``, int64."""
    return mask.size(1) - 1 - mask.flip(1).long().argmax(1, keepdim=True)

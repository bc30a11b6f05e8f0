"""The language of a sentence, told by a tag among its tokens."""

from typing import Collection, List, Sequence

import torch
from torch import Tensor


class LanguageTags:
    """Finds the language tags of a vocabulary, and the language of each sentence.

    Args:
        symbols: the vocabulary, in the order of its ids
        prefix: what a language's tag begins with: ``__src__`` for ``__src__hi``
        specials: ids of symbols that are no words, and so no tags whatever they begin with

    Attributes:
        pools: the languages in the order of their ids, then ``untagged`` for sentences without a tag (with a ``_``
            before it where that is the name of a language)
    """

    def __init__(self, symbols: Sequence[str], prefix: str, specials: Collection[int] = ()) -> None:
        languages: List[str] = []
        table = torch.zeros(len(symbols), dtype=torch.long)  # vocabulary id -> language + 1, 0 for other words
        for index, symbol in enumerate(symbols):
            if symbol.startswith(prefix) and len(symbol) > len(prefix) and index not in specials:
                languages.append(symbol[len(prefix) :])
                table[index] = len(languages)
        untagged = "untagged"
        while untagged in languages:
            untagged = f"_{untagged}"
        self.pools = languages + [untagged]
        self._table = table

    def __len__(self) -> int:
        """How many languages have a tag."""
        return len(self.pools) - 1

    def of_sentences(self, tokens: Tensor) -> Tensor:
        """The language of each sentence, by the first tag in it.

        Args:
            tokens: vocabulary ids, shape ``(B, S)``, padded on either side

        Returns:
            index into `pools`, shape ``(B,)``, int64
        """
        if self._table.device != tokens.device:
            self._table = self._table.to(tokens.device)
        found = self._table[tokens]  # B x S
        first = (found > 0).long().argmax(dim=1, keepdim=True)
        language = found.gather(1, first).squeeze(1) - 1
        return torch.where(language < 0, torch.full_like(language, len(self)), language)

"""How a task lays out the sentences that it asks its model: where it puts the tokens that name languages."""

from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor

from kd_ext.errors import ConfigError
from kd_ext.modules.positions import Positions

HEAD, EOS, TAIL, BEGIN = "head", "eos", "tail", "begin"


class LanguageToken(NamedTuple):
    """The token of a sentence's language, on one side.

    Attributes:
        place: ``head``: before the sentence; ``tail``: behind its eos; ``eos``: in place of its eos; ``begin``: in
            place of the eos that a decoder begins with
        default: its id; None: each sentence has one of its own
        known: the ids of all languages' tokens that a sentence may have by itself, wherever it is in a source, at the
            head of a target
        ends: whether it also ends a target, behind its eos
        of_target: whether a source's token names the language that is wanted of the target. One that a sentence has by
            itself may then as well name the source's: with a default no other than that is understood
    """

    place: str
    default: Optional[int]
    known: Tuple[int, ...] = ()
    ends: bool = False
    of_target: bool = False


class Beginning(NamedTuple):
    """What a translation is decoded from.

    Attributes:
        net_input: ``src_tokens``, shape ``(B, S)``, and ``src_lengths``, shape ``(B,)``
        prefix: what each translation begins with, shape ``(B, P)``
        bos: with what the decoder begins; None: with eos
        eos: what ends a translation, behind its eos; None: its eos
    """

    net_input: Dict[str, Tensor]
    prefix: Tensor
    bos: Optional[int]
    eos: Optional[int]


class InputFormat:
    """Makes of a batch of plain sentences what a model's own task would have made of them.

    Args:
        pad: the padding symbol's id
        source: what names a language in the source; None: nothing
        target: what names one in the target, ``head`` or ``begin``; None: nothing
        bos: what is put before each sentence of both sides; None: nothing
        left_pad_source: on which side sources are padded
    """

    def __init__(
        self,
        pad: int,
        source: Optional[LanguageToken] = None,
        target: Optional[LanguageToken] = None,
        bos: Optional[int] = None,
        left_pad_source: bool = True,
    ) -> None:
        self._pad, self._bos, self._left = pad, bos, left_pad_source
        self._source, self._target = source, target

    def __eq__(self, other: object) -> bool:
        """Whether both make the same of every batch."""
        return isinstance(other, InputFormat) and vars(self) == vars(other)

    @property
    def added(self) -> Tuple[int, int]:
        """How many tokens a source and a target grow by at most."""
        sides = (
            token is not None and token.default is not None and token.place in (HEAD, TAIL)
            for token in (self._source, self._target)
        )
        source, target = (int(grows) + int(self._bos is not None) for grows in sides)
        return source, target

    @property
    def languages(self) -> Set[int]:
        """The ids of all tokens that name languages."""
        sides = [token for token in (self._source, self._target) if token is not None]
        return {i for token in sides for i in (*token.known, token.default) if i is not None}

    @property
    def wanted(self) -> Tuple[Optional[int], Optional[int]]:
        """A token such as each source and target has to have by itself; None: none is needed."""
        source, target = (
            token.known[0] if token is not None and token.default is None else None
            for token in (self._source, self._target)
        )
        return source, target

    def apply(self, net_input: Dict[str, Any], positions: Positions) -> Tuple[Dict[str, Any], Positions]:
        """What the model is asked, and where in it the chosen positions are.

        Args:
            net_input: ``src_tokens``, shape ``(B, S)``, and ``prev_output_tokens``, shape ``(B, T)``, which begin
                with one token, padded on either side
            positions: n of them, in a batch of shape ``(B, T)``

        Raises:
            ConfigError: a sentence has no language's token, or one where the task could not have put it
        """
        src, lengths = self._lay_source(net_input["src_tokens"])
        prev, columns = self._lay_target(net_input["prev_output_tokens"])
        mask = positions.mask.new_zeros(len(prev), prev.size(1) + 1).scatter_(1, columns, positions.mask)[:, :-1]
        asked = {**net_input, "src_tokens": src, "src_lengths": lengths, "prev_output_tokens": prev}
        return asked, Positions(mask, positions.count)

    def beginning(self, net_input: Dict[str, Any]) -> Beginning:
        """How the model is asked to translate.

        Args:
            net_input: as for :meth:`apply`; of ``prev_output_tokens`` the token of a language that a reference begins
                with counts, which its translation then begins with

        Raises:
            ConfigError: as :meth:`apply`
        """
        src, lengths = self._lay_source(net_input["src_tokens"])
        prev, token, bos, eos = net_input["prev_output_tokens"], self._target, None, None
        prefix = self._bos_of(prev)
        if token is not None and token.place == HEAD:
            second = prev.ne(self._pad) & (prev.ne(self._pad).cumsum(1)).eq(2)
            prefix.append(self._language(token, "target", prev, second)[0])
        elif token is not None:
            self._refuse_language_in(prev, prev.ne(self._pad))
            bos, eos = token.default, token.default if token.ends else None
        begins = torch.stack(prefix, 1) if prefix else src.new_empty(len(src), 0)
        return Beginning({"src_tokens": src, "src_lengths": lengths}, begins, bos, eos)

    def _lay_source(self, tokens: Tensor) -> Tuple[Tensor, Tensor]:
        keep, heads, tails = tokens.ne(self._pad), self._bos_of(tokens), []
        width = tokens.size(1)
        if self._source is not None:
            language, own = self._language(self._source, "source", tokens, keep)
            if self._source.place == HEAD:
                heads.append(language)
            else:
                tails.append(language)
            if self._source.place == EOS:
                keep, width = keep & ~_last(keep), width - 1
            keep = keep & ~own
        return _lay(tokens, keep, heads, tails, self._pad, self._left, width)[:2]

    def _lay_target(self, tokens: Tensor) -> Tuple[Tensor, Tensor]:
        real = tokens.ne(self._pad)
        order = real.cumsum(1) - 1  # which of a row's tokens each is, B x T
        first = real & order.eq(0)
        heads, keep = [(tokens * first).sum(1), *self._bos_of(tokens)], real & ~first
        own = torch.zeros_like(keep)
        if self._target is not None and self._target.place == HEAD:
            language, own = self._language(self._target, "target", tokens, real & order.eq(1))
            heads.append(language)
        elif self._target is not None:
            heads[0], _ = self._language(self._target, "target", tokens, torch.zeros_like(real))
            self._refuse_language_in(tokens, real)
        laid, _, start = _lay(tokens, keep & ~own, heads, [], self._pad, False, tokens.size(1) - 1)
        # what a row has by itself is asked for at the places that it has there; what is put in moves the others on
        grown = len(heads) - 1 - own.sum(1, keepdim=True)
        return laid, (start + order + grown).masked_fill(~real, laid.size(1))  # of padding: one behind

    def _bos_of(self, tokens: Tensor) -> List[Tensor]:
        return [] if self._bos is None else [tokens.new_full(tokens.shape[:1], self._bos)]

    def _language(self, token: LanguageToken, side: str, tokens: Tensor, where: Tensor) -> Tuple[Tensor, Tensor]:
        """Each sentence's token, shape ``(B,)``, and where it has one of its own, at most one, shape ``(B, T)``."""
        own = self._is_known(token, tokens) & where
        if (
            token.of_target
            and token.known
            and token.default is not None
            and bool((own & tokens.ne(token.default)).any())
        ):
            raise ConfigError(
                "--teacher-checkpoint-path: a source sentence has a token of another language than the run's "
                "--target-lang, which the teacher's task names in its sources; leave such tokens out, or, if they name "
                "what is wanted of each sentence, give --target-lang a name that is none of the teacher's languages"
            )
        own = own & own.cumsum(1).eq(1)
        has_own = own.any(1)
        if token.default is None and not bool((has_own | tokens.eq(self._pad).all(1)).all()):
            raise ConfigError(
                f"--teacher-checkpoint-path: a {side} sentence has no token of a language that the teacher knows, and "
                f"the run's --{side}-lang is none of them; put such tokens into the text, or train a pair of its own"
            )
        found = (tokens * own).sum(1)
        return found if token.default is None else found.masked_fill(~has_own, token.default), own

    def _is_known(self, token: LanguageToken, tokens: Tensor) -> Tensor:
        is_known = torch.zeros_like(tokens, dtype=torch.bool)
        for known in token.known:
            is_known |= tokens.eq(known)
        return is_known

    def _refuse_language_in(self, tokens: Tensor, real: Tensor) -> None:
        assert self._target is not None
        if self._target.known and bool((self._is_known(self._target, tokens) & real).any()):
            raise ConfigError(
                "--teacher-checkpoint-path: a target sentence has a language's token, with which the teacher's task "
                "begins its decoder and which it never predicts; leave such tokens out of the targets"
            )


def _last(real: Tensor) -> Tensor:
    """Where the last true of each row is."""
    return real & real.cumsum(1).eq(real.sum(1, keepdim=True))


def _lay(
    tokens: Tensor, keep: Tensor, heads: List[Tensor], tails: List[Tensor], pad: int, left: bool, longest: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """What is kept of each row, at most so many, with others, shape ``(B,)``, around it, and padding on one side.

    Returns:
        tokens, shape ``(B, longest + others)``, of which real, shape ``(B,)``, and where each begins, ``(B, 1)``
    """
    width = longest + len(heads) + len(tails)
    kept = keep.sum(1, keepdim=True)  # B x 1
    lengths = kept + len(heads) + len(tails)
    start = width - lengths if left else torch.zeros_like(kept)
    places = (start + len(heads) + keep.cumsum(1) - 1).masked_fill(~keep, width)  # what is not kept lands behind
    laid = tokens.new_full((len(tokens), width + 1), pad).scatter_(1, places, tokens)[:, :width]
    for i, head in enumerate(heads):
        laid.scatter_(1, start + i, head.unsqueeze(1))
    for i, tail in enumerate(tails):
        laid.scatter_(1, start + len(heads) + kept + i, tail.unsqueeze(1))
    return laid, lengths.squeeze(1), start

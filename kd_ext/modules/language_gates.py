"""Tokens of many languages in one tensor, and the gate of each language among them."""

from decimal import Decimal
from typing import Tuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kd_ext.modules.running_rank import MARGIN, RunningRank
from kd_ext.modules.token_queue import selection_size

Counts = TypeVar("Counts", Tensor, np.ndarray)

# A language's own tokens make its gate if they are so many, or one of so many of all tokens is of it. Of fewer than 20,
# rounding up to a whole token alone can select more than another twentieth.
ENOUGH_TOKENS, ENOUGH_PART = 20, 100

_BITS = 32  # of a key, for the value
_VALUE = (1 << _BITS) - 1
_BLOCK = 1 << 16  # keys that a core's cache holds, with what is computed of them
_LEAST_MARGIN = 16


def pack(values: Tensor, language: Tensor) -> Tensor:
    """Keys that are ordered by language, and within a language by value.

    Args:
        values: shape ``(n,)``, float32; NaN is larger than any number
        language: shape ``(n,)``, int64, not negative

    Returns:
        shape ``(n,)``, int64: the language above the value's bits
    """
    values = values.detach().float() + 0.0  # which makes 0 of -0
    values = torch.where(values.isnan(), torch.full_like(values, float("nan")), values)  # one NaN of all that there are
    return (language << _BITS) + (_mirrored(values.view(torch.int32)).long() + (1 << (_BITS - 1)))


def unpack(keys: Tensor) -> Tuple[Tensor, Tensor]:
    """The values, float32, and the languages, int64, of :func:`pack`."""
    bits = ((keys & _VALUE) - (1 << (_BITS - 1))).int()
    return _mirrored(bits).view(torch.float32), keys >> _BITS


def _mirrored(bits: Tensor) -> Tensor:
    """Floats' bits in the order of the floats, as whole numbers, and back: those of negative ones fall as they rise."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def selection_sizes(rate: float, pools: Counts) -> Counts:
    """:func:`~kd_ext.modules.token_queue.selection_size` of many pools, on the device where they are.

    Args:
        rate: in (0, 1]
        pools: int64, a tensor or an array, each less than 2^31
    """
    _, digits, exponent = Decimal(repr(rate)).as_tuple()
    share = int("".join(map(str, digits)))
    # rate = share / 10^places; in limbs of 9 decimals, as a product has more than the 63 bits of a whole number
    places = max(-int(exponent), 9)
    share *= 10 ** (places + int(exponent))
    if places - 9 > 18:  # the share of 2^31 tokens is less than one
        return (pools > 0) + 0 * pools
    high, low = divmod(share, 10**9)
    tail = pools * low
    head = pools * high + tail // 10**9
    unit = 10 ** (places - 9)
    return head // unit + ((head % unit > 0) | (tail % 10**9 > 0))


class LanguageGates:
    """The gates of languages that share one queue: the ``ceil(rate * m)``-th largest of a language's m values in it.

    A language with fewer than 20 tokens that are less than a hundredth of all has the gate of all values, whatever
    their language.

    On a CPU the values around each last answer are kept in view, as :class:`~kd_ext.modules.running_rank.RunningRank`
    does it for one queue. Elsewhere all are sorted, and nothing waits for the device.

    Args:
        rate: share to select, in (0, 1]
        languages: how many there are, P
    """

    def __init__(self, rate: float, languages: int) -> None:
        self._rate = rate
        self._languages = languages
        # between which keys the answers are expected: at first nowhere
        self._low = np.full(languages, np.iinfo(np.int64).max)
        self._high = self._low.copy()
        self._whole = RunningRank()

    def __call__(self, keys: Tensor, asked: Tensor) -> Tensor:
        """The gates.

        Args:
            keys: of the whole queue, in any order, shape ``(n,)``, not empty
            asked: the languages whose gates are needed, shape ``(P,)``, bool

        Returns:
            shape ``(P,)``, float32; NaN for languages that are not asked for
        """
        on_cpu = keys.device.type == "cpu"
        found, counts = self._near_the_last(keys.numpy()) if on_cpu else self._sorted(keys)
        is_enough = (counts >= ENOUGH_TOKENS) | (ENOUGH_PART * counts >= keys.numel())
        gates = unpack(found)[0]
        if not (on_cpu and bool((is_enough | ~asked).all())):  # a GPU is not asked: it would have to be waited for
            of_all = self._whole(keys & _VALUE, selection_size(self._rate, keys.numel()))
            gates = torch.where(is_enough, gates, unpack(of_all.reshape(1))[0])
        return torch.where(asked, gates, torch.full_like(gates, float("nan")))

    def _sorted(self, keys: Tensor) -> Tuple[Tensor, Tensor]:
        """The keys of the gates, and how many keys each language has."""
        ordered = keys.sort().values
        bounds = torch.arange(self._languages + 1, device=keys.device) << _BITS
        ends = torch.searchsorted(ordered, bounds)
        counts = ends[1:] - ends[:-1]
        places = ends[1:] - selection_sizes(self._rate, counts)
        return ordered[places.clamp(max=keys.numel() - 1)], counts

    def _near_the_last(self, keys: np.ndarray) -> Tuple[Tensor, Tensor]:
        """The same; exact: the keys of languages whose gates are not where they are expected are sorted."""
        places = np.zeros((self._languages, 3), dtype=np.int64)  # how many are below, inside and above
        parts = []
        for start in range(0, keys.size, _BLOCK):
            block = keys[start : start + _BLOCK]
            language = block >> _BITS
            place = (block >= self._low[language]).view(np.int8) + (block > self._high[language]).view(np.int8)
            places += np.bincount(3 * language + place, minlength=places.size).reshape(places.shape)
            parts.append(block[place == 1])
        inside = np.sort(np.concatenate(parts))
        counts = places.sum(1)
        sizes = selection_sizes(self._rate, counts)
        rank = sizes - places[:, 2]
        is_inside = (rank > 0) & (rank <= places[:, 1])
        found = np.zeros(self._languages, dtype=np.int64)
        found[is_inside] = inside[(places[:, 1].cumsum() - rank)[is_inside]]
        is_missed = ~is_inside & (counts > 0)
        if is_missed.any():
            found[is_missed] = self._anew(keys, is_missed, counts, sizes)
        return torch.from_numpy(found), torch.from_numpy(counts)

    def _anew(self, keys: np.ndarray, is_missed: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The gates of some languages, which are expected around them from now on."""
        missed, counts = np.flatnonzero(is_missed), counts[is_missed]
        ordered = np.sort(keys[is_missed[keys >> _BITS]])
        ends = counts.cumsum()
        places = ends - sizes[is_missed]
        margin = np.maximum((MARGIN * counts).astype(np.int64), _LEAST_MARGIN)
        low, high = places - margin, places + margin
        # beyond a language's least and largest value there is nothing that could come between
        is_open = low <= ends - counts
        self._low[missed] = np.where(is_open, missed << _BITS, ordered[np.maximum(low, 0)])
        is_open = high >= ends - 1
        self._high[missed] = np.where(is_open, (missed << _BITS) + _VALUE, ordered[np.minimum(high, ordered.size - 1)])
        return ordered[places]

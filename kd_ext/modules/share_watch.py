"""Whether a selection keeps its promise: the share of tokens that is really selected, against the rate."""

from math import sqrt
from typing import Dict, Sequence, Set

# How many updates are judged together. The first so many are not: the student learns so fast then that every queue
# is behind.
UPDATES = 200
# Of the rate, the part by which a share has to differ. A queue that lags a little costs a twentieth of it, as measured;
# a fifth is more than what a change of the rate is meant to do.
FAR = 1 / 5
# ... and of the standard error of a share of so many tokens, the multiple, so that a few tokens raise no alarm. It is
# large as the tokens of a sentence are not independent.
STANDARD_ERRORS = 5


class ShareWatch:
    """Counts what was selected of each pool, and says once of each whose share is far from the rate.

    Args:
        rate: what the shares should be, in (0, 1]
        pools: their names
    """

    def __init__(self, rate: float, pools: Sequence[str]) -> None:
        self._rate = rate
        self._pools = list(pools)
        self._updates = 0
        self._told: Set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._has_more = False
        self._tokens = [0] * len(self._pools)
        self._selected = [0] * len(self._pools)

    def add(self, tokens: Sequence[int], selected: Sequence[int]) -> None:
        """A batch's tokens of each pool, and how many of them were selected."""
        self._has_more = True
        self._tokens = [a + b for a, b in zip(self._tokens, tokens)]
        self._selected = [a + b for a, b in zip(self._selected, selected)]

    def update(self) -> Dict[str, float]:
        """The batches of an update have been added; with none, it does not count.

        Returns:
            after every 200 updates but the first 200, the pools whose share over these was far from the rate for the
            first time, and the shares
        """
        if not self._has_more:
            return {}
        self._has_more = False
        self._updates += 1
        if self._updates % UPDATES:
            return {}
        far = {
            pool: selected / tokens
            for pool, tokens, selected in zip(self._pools, self._tokens, self._selected)
            if pool not in self._told and self._is_far(tokens, selected)
        }
        self._forget()
        if self._updates == UPDATES:
            return {}
        self._told.update(far)  # their names
        return far

    def _is_far(self, tokens: int, selected: int) -> bool:
        if tokens == 0:
            return False
        error = sqrt(self._rate * (1 - self._rate) / tokens)
        return abs(selected / tokens - self._rate) > max(FAR * self._rate, STANDARD_ERRORS * error)

"""Which target tokens are distilled: one class for each selection strategy.

Selective knowledge distillation (Wang et al., 2021, "Selective Knowledge Distillation for Neural Machine
Translation") distils the tokens that the student finds hard: those whose negative log-likelihood is among the
largest share ``rate`` of a pool. The strategies differ in the pool; language-wise pools are those of Gumma et al.,
2023, "An Empirical Study of Leveraging Knowledge Distillation for Compressing Multilingual NMT Models".
"""

import logging
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor

from kd_ext.modules.collectives import Workers
from kd_ext.modules.language_gates import LanguageGates, pack, unpack
from kd_ext.modules.running_rank import kth_largest
from kd_ext.modules.token_queue import TokenQueue, selection_size

logger = logging.getLogger(__name__)


# of each worker, how many tokens it has of each pool
Tally = Sequence[Sequence[int]]


class Selection(NamedTuple):
    """What a strategy chose among ``n`` tokens.

    Attributes:
        mask: shape ``(n,)``, bool: distil this token
        gates: shape ``(pools,)``, float32, nats: the smallest negative log-likelihood that is selected from each pool;
            NaN where the pool is empty
    """

    mask: Tensor
    gates: Tensor


class TokenSelector:
    """Base class of the strategies: every token is selected, there is no pool and no state.

    Args:
        rate: share of the pool to select, in (0, 1]
        capacity: of each queue, in tokens
        pools: names of the pools; the last one takes the tokens of no known language
        workers: all that train together
    """

    uses_alpha = False
    needs_rate = False
    needs_queue = False
    by_language = False
    window = "each"  # the value of --kd-queue-window

    def __init__(self, rate: float, capacity: int, pools: Sequence[str], workers: Optional[Workers] = None) -> None:
        self.rate = rate
        self.capacity = capacity
        self.pools = list(pools)
        self.workers = workers or Workers()
        self._warned = False

    def weights(self, alpha: float) -> Tuple[float, float]:
        """The weights of the label-smoothed term and of the distillation term."""
        return 1.0, 1.0

    def tally(self, language: Tensor, lengths: Tensor) -> Tensor:
        """How many tokens each of W workers has of each pool.

        Every worker must call it for every batch, with lengths of 0 where it has no tokens. Nothing waits for it.

        Args:
            language: index into `pools` of each sentence, shape ``(B,)``, int64
            lengths: its tokens, shape ``(B,)``, int64

        Returns:
            shape ``(W, pools)``, int64; of this worker alone, W = 1, where the strategy needs no more
        """
        own = lengths.new_zeros(len(self.pools)).scatter_add_(0, language, lengths)
        return self.workers.stack(own) if self.needs_queue else own.unsqueeze(0)

    def select(self, nll: Tensor, language: Tensor, tally: Optional[Tally] = None) -> Selection:
        """Choose the tokens of one training batch, and enter them into the pool.

        Under several workers every worker must call it for every batch, with no tokens where it has none.

        Args:
            nll: negative log-likelihood under the student, shape ``(n,)``, float32, nats, no padding
            language: index into `pools` of each token's sentence, shape ``(n,)``, int64
            tally: what :meth:`tally` gives; None: it is asked for here, for which a GPU has to be waited for
        """
        if tally is None:
            tally = self.tally(language, torch.ones_like(language)).tolist()
        return self._select(nll, language, tally)

    def _select(self, nll: Tensor, language: Tensor, tally: Tally) -> Selection:
        return Selection(torch.ones_like(nll, dtype=torch.bool), nll.new_empty(0))

    def commit(self) -> None:
        """The update that the last batches belong to was made."""

    def rollback(self) -> None:
        """Forget the batches since the last commit: their update was skipped."""

    def state_dict(self) -> Dict[str, Tensor]:
        """The committed queues by name, float32, oldest first, on the CPU."""
        return {}

    def load_state_dict(self, queues: Dict[str, Tensor], pools: Optional[Sequence[str]] = None) -> None:
        """Continue from the queues of :meth:`state_dict`; of longer ones the newest values are kept.

        Args:
            queues: by name
            pools: those that there were
        """

    def sizes(self) -> Dict[str, int]:
        """How many tokens each queue holds."""
        return {}

    def _warn_of_untagged(self, tally: Tally) -> None:
        if not self._warned and any(counts[-1] for counts in tally):
            self._warned = True
            logger.warning("a sentence without a language tag: such sentences share the queue '%s'", self.pools[-1])


class WordSeqLevel(TokenSelector):
    """Every token, both terms weighed by alpha (Hinton et al., 2015; Kim and Rush, 2016)."""

    uses_alpha = True

    def weights(self, alpha: float) -> Tuple[float, float]:
        return 1 - alpha, alpha


class WordLevel(TokenSelector):
    """Every token, the distillation term alone: alpha = 1."""

    def weights(self, alpha: float) -> Tuple[float, float]:
        return 0.0, 1.0


class _Queued(TokenSelector):
    """A queue for each pool, created when its first token comes."""

    needs_rate = needs_queue = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queues: Dict[str, TokenQueue] = {}

    def _push(self, pool: str, nll: Tensor) -> None:
        self._queues.setdefault(pool, TokenQueue(self.capacity)).push(nll)

    def commit(self) -> None:
        for queue in self._queues.values():
            queue.commit()

    def rollback(self) -> None:
        for queue in self._queues.values():
            queue.rollback()

    def state_dict(self) -> Dict[str, Tensor]:
        self.rollback()
        return {pool: queue.values().cpu() for pool, queue in self._queues.items()}

    def load_state_dict(self, queues: Dict[str, Tensor], pools: Optional[Sequence[str]] = None) -> None:
        self._queues = {pool: TokenQueue.from_values(self.capacity, v) for pool, v in queues.items()}

    def sizes(self) -> Dict[str, int]:
        return {pool: len(queue) for pool, queue in self._queues.items()}


class BatchLevel(TokenSelector):
    """The pool is this worker's batch."""

    needs_rate = True

    def _select(self, nll: Tensor, language: Tensor, tally: Tally) -> Selection:
        if nll.numel() == 0:
            return Selection(nll.bool(), nll.new_full((1,), float("nan")))
        gate = kth_largest(nll, selection_size(self.rate, nll.numel()))
        return Selection(nll >= gate, gate.reshape(1))


class GlobalLevel(_Queued):
    """The pool is a queue of the newest tokens of all workers."""

    def _select(self, nll: Tensor, language: Tensor, tally: Tally) -> Selection:
        self._push("all", self.workers.concat(nll, [sum(counts) for counts in tally]))
        queue = self._queues["all"]
        if len(queue) == 0:
            return Selection(nll.bool(), nll.new_full((1,), float("nan")))
        gate = queue.gate(self.rate)
        return Selection(nll >= gate, gate.reshape(1))


class GlobalLanguageWise(_Queued):
    """Each language has a queue of its own, and is gated by it."""

    by_language = True

    def _select(self, nll: Tensor, language: Tensor, tally: Tally) -> Selection:
        self._warn_of_untagged(tally)
        gates = nll.new_full((len(self.pools),), float("nan"))
        for index, values in enumerate(self._by_language(nll, language, tally)):
            if values.numel() == 0:
                continue
            pool = self.pools[index]
            self._push(pool, values)
            gates[index] = self._queues[pool].gate(self.rate)
        return Selection(nll >= gates[language], gates)

    def _by_language(self, nll: Tensor, language: Tensor, tally: Tally) -> List[Tensor]:
        """The losses of all workers for each pool, by workers in rank order."""
        # sorted by language, so that the tally tells whose a loss is, and languages need not be sent
        ordered = nll[torch.sort(language, stable=True).indices]
        everywhere = self.workers.concat(ordered, [sum(counts) for counts in tally])
        parts = everywhere.split([n for counts in tally for n in counts])
        return [torch.cat(parts[index :: len(self.pools)]) for index in range(len(self.pools))]


class SharedWindow(TokenSelector):
    """One queue of the newest tokens of all languages; each language is gated by its own tokens in it.

    So a rare language's gate is of the same time as a frequent one's. Of a language with too few tokens in the queue
    the gate is that of all tokens, see :class:`~kd_ext.modules.language_gates.LanguageGates`.
    """

    needs_rate = needs_queue = by_language = True
    window = "shared"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queue = TokenQueue(self.capacity, torch.int64)
        self._gates = LanguageGates(self.rate, len(self.pools))

    def _select(self, nll: Tensor, language: Tensor, tally: Tally) -> Selection:
        self._warn_of_untagged(tally)
        keys = self.workers.concat(pack(nll, language), [sum(counts) for counts in tally])
        self._queue.push(keys)
        if len(self._queue) == 0:
            return Selection(nll.bool(), nll.new_full((len(self.pools),), float("nan")))
        asked = torch.zeros(len(self.pools), dtype=torch.bool, device=nll.device).scatter_(0, unpack(keys)[1], True)
        gates = self._gates(self._queue.unordered(), asked)
        return Selection(nll >= gates[language], gates)

    def commit(self) -> None:
        self._queue.commit()

    def rollback(self) -> None:
        self._queue.rollback()

    def state_dict(self) -> Dict[str, Tensor]:
        """The committed tokens, oldest first, on the CPU: ``values``, float32, and ``languages``, int32, of `pools`."""
        self.rollback()
        values, languages = unpack(self._queue.values().cpu())
        return {"values": values, "languages": languages.int()}

    def load_state_dict(self, queues: Dict[str, Tensor], pools: Optional[Sequence[str]] = None) -> None:
        # by name: the tags of the dictionary can be others by now. Tokens of languages that are gone are left out.
        index = {pool: i for i, pool in enumerate(self.pools)}
        languages = torch.tensor([index.get(pool, -1) for pool in pools or self.pools])[queues["languages"].long()]
        known = languages >= 0
        self._queue = TokenQueue.from_values(self.capacity, pack(queues["values"][known], languages[known]))

    def sizes(self) -> Dict[str, int]:
        counts = unpack(self._queue.unordered())[1].bincount(minlength=len(self.pools)).tolist()
        return {pool: count for pool, count in zip(self.pools, counts) if count > 0}


# the values of --kd-strategy
STRATEGIES: Dict[str, Type[TokenSelector]] = {
    "word_seq_level": WordSeqLevel,
    "word_level": WordLevel,
    "batch_level": BatchLevel,
    "global_level": GlobalLevel,
    "global_language_wise": GlobalLanguageWise,
}

# the values of --kd-queue-window, for the strategies whose queues are by language
WINDOWS: Dict[str, Type[TokenSelector]] = {"each": GlobalLanguageWise, "shared": SharedWindow}


def selector_class(strategy: str, window: str = "each") -> Type[TokenSelector]:
    """Of the strategy, and of its queues where there is a choice."""
    return WINDOWS[window] if STRATEGIES[strategy].by_language else STRATEGIES[strategy]

"""Batch in, loss and metrics out: label-smoothed cross-entropy with a distillation term."""

import logging
import math
import os
from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional, Set, Union

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics

from kd_ext.errors import ConfigError
from kd_ext.models.output_projection import NoProjectionError, Projection, find_projection
from kd_ext.modules.chunked_loss import Weights, chunked_loss, chunked_nll, of_tokens
from kd_ext.modules.collectives import Workers
from kd_ext.modules.distillation_loss import distillation_term, label_smoothed_nll
from kd_ext.modules.fetched import Fetched
from kd_ext.modules.positions import Positions, true_first
from kd_ext.modules.share_watch import UPDATES, ShareWatch
from kd_ext.modules.token_selection import WINDOWS, SharedWindow, Tally, TokenSelector, selector_class
from kd_ext.tasks.translation_with_kd import CRITERION, TranslationWithKDTask, given_flags
from kd_ext.upstream.command_line import list_flags

logger = logging.getLogger(__name__)


@dataclass
class LabelSmoothedCrossEntropyWithKDConfig(LabelSmoothedCrossEntropyCriterionConfig):
    alpha: float = field(
        default=0.5,
        metadata={"help": "weight of the distillation loss, in [0, 1]; used by word_seq_level alone"},
    )
    kd_rate: Optional[float] = field(
        default=None,
        metadata={"help": "share of tokens that get distillation, in (0, 1]; for the selective strategies"},
    )
    kd_queue_size: Optional[int] = field(
        default=None,
        metadata={"help": "capacity of each FIFO queue in tokens; for the global strategies"},
    )
    kd_queue_window: str = field(
        default="each",
        metadata={
            "help": "for global_language_wise: each: a queue of that size for each language; "
            "shared: one queue of that size, of the newest tokens of all languages"
        },
    )
    kd_temperature: float = field(
        default=1.0,
        metadata={"help": "temperature T of both softmaxes of the distillation term, which is multiplied by T^2"},
    )


TEMPERATURES = (0.01, 1000)  # softmaxes beyond them are one word, or uniform, and T^2 gets out of float32


list_flags(LabelSmoothedCrossEntropyWithKDConfig, f"--criterion {CRITERION}")


class _Batch:
    """The real tokens of a batch, ``n`` of them: no padding, none of the ignored prefix.

    How many there are, and of which language, is fetched from a GPU while it is busy with the models.

    Args:
        sample: what they are of; its ``net_input`` are the arguments of the models' forward
        real: where they are, shape ``(B, T)``, bool
        language: the pool of each sentence, shape ``(B,)``, int64
        selector: counts the tokens of each pool

    Attributes:
        is_dummy: the batch is another worker's
    """

    def __init__(self, sample: Dict, real: torch.Tensor, language: torch.Tensor, selector: TokenSelector) -> None:
        self.sample, self.real = sample, real
        self.is_dummy: bool = sample.get("is_dummy", False)
        self._language, self._pools = language, len(selector.pools)
        lengths = real.sum(1)
        tally = selector.tally(language, torch.zeros_like(lengths) if self.is_dummy else lengths)
        self._fetched = Fetched(torch.cat([lengths.sum().unsqueeze(0), tally.flatten()]))
        self.positions = Positions(real, lambda: self.count)

    @property
    def count(self) -> int:
        """n"""
        return self._fetched.wait()[0]

    @property
    def tally(self) -> Tally:
        """The tokens of each worker of each pool, none of a dummy batch."""
        counts = self._fetched.wait()[1:]
        return [counts[start : start + self._pools] for start in range(0, len(counts), self._pools)]

    @property
    def target(self) -> torch.Tensor:
        """Shape ``(n,)``, int64."""
        return self.positions.take(self.sample["target"])

    @property
    def language(self) -> torch.Tensor:
        """The pool of each token's sentence, shape ``(n,)``, int64."""
        return self.positions.take(self._language.unsqueeze(1).expand_as(self.real))


class _Chosen(NamedTuple):
    """What was selected among the tokens of a batch.

    Attributes:
        mask: shape ``(n,)``, bool
        gates: of each pool, shape ``(pools,)``, float32, nats
        counts: how many tokens are selected, and how many of each pool
    """

    mask: torch.Tensor
    gates: torch.Tensor
    counts: List[int]


class _Terms(NamedTuple):
    """As :class:`~kd_ext.modules.chunked_loss.ChunkedLoss`, and what was selected."""

    loss: torch.Tensor
    nll: torch.Tensor
    cross_entropy: torch.Tensor
    kl: torch.Tensor
    correct: torch.Tensor
    chosen: Optional[_Chosen]


@register_criterion(CRITERION, dataclass=LabelSmoothedCrossEntropyWithKDConfig)
class LabelSmoothedCrossEntropyWithKD(LabelSmoothedCrossEntropyCriterion):
    """The loss of a student with a teacher.

    In training: ``golden * sum_i smoothed_i + distilled * sum_{i selected} kd_i`` over the real target tokens, where
    the ``--kd-strategy`` of the task says the two weights and the selection. In validation, and without a
    teacher: fairseq's label-smoothed cross-entropy, so that the curves of all runs can be compared.

    Raises:
        ConfigError: where a flag cannot be used
    """

    def __init__(
        self,
        task,
        sentence_avg,
        label_smoothing,
        ignore_prefix_size=0,
        report_accuracy=False,
        alpha=0.5,
        kd_rate=None,
        kd_queue_size=None,
        kd_queue_window="each",
        kd_temperature=1.0,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        if not isinstance(task, TranslationWithKDTask):
            name = getattr(task.cfg, "_name", None) or type(task).__name__
            raise ConfigError(f"--criterion {CRITERION} works with --task translation_with_kd, not with --task {name}")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"--label-smoothing {label_smoothing}: out of range; a number in [0, 1)")
        if ignore_prefix_size < 0:
            raise ConfigError(f"--ignore-prefix-size {ignore_prefix_size}: negative; a number of tokens, or 0 for none")
        strategy = task.cfg.kd_strategy
        _check_flags(strategy, alpha, kd_rate, kd_queue_size, kd_queue_window, kd_temperature, task)
        kind = selector_class(strategy, kd_queue_window)
        self.temperature = kd_temperature
        self.languages = task.languages if kind.by_language and task.trains else None
        pools = self.languages.pools if self.languages else ["all"]
        if kind.needs_queue:
            _check_memory(kd_queue_size, *((1, 8) if kind is SharedWindow else (len(pools), 4)))
        self.selector: TokenSelector = kind(
            rate=kd_rate,
            capacity=kd_queue_size,
            pools=pools,
            workers=Workers(_data_parallel_group()),
        )
        self.golden_weight, self.distilled_weight = self.selector.weights(alpha)
        self.teacher = task.load_teacher(kd_temperature) if self.distilled_weight > 0 else None
        self._teacher_dtype = task.teacher_dtype
        task.selector = self.selector
        self._said: Set[str] = set()  # why a student has no projection, and the like: each once
        self._watch = ShareWatch(kd_rate, pools) if kind.needs_queue else None
        logger.info(
            "--kd-strategy %s: loss = %g label-smoothed + %g distillation; rate %s, queue %s%s, temperature %g",
            *(strategy, self.golden_weight, self.distilled_weight, kd_rate, kd_queue_size),
            *(" of all languages" if kind is SharedWindow else "", kd_temperature),
        )

    def train(self, mode=True):
        # The trainer calls this at the start of every update. Pushes that are not committed by now belong to an
        # update that was skipped: overflow, out of memory.
        self.selector.rollback()
        if mode and self._watch is not None:
            self._say_if_far(self._watch.update())
        return super().train(mode)

    def forward(self, model, sample, reduce=True):
        """The loss of one batch, as fairseq's criterions return it.

        Returns:
            the loss (scalar, float32, nats, summed), the sample size, and the sums to log
        """
        if not model.training:
            return super().forward(model, sample, reduce)
        self._say_if_all_is_ignored(sample["target"].size(1))
        projection = self._find_projection(model)
        if self.distilled_weight == 0 and projection is None:
            return super().forward(model, sample, reduce)
        if self.distilled_weight > 0:
            if self.teacher is None:
                raise RuntimeError("a model that was loaded to be used cannot be trained: its teacher was not loaded")
            dtype = self._teacher_dtype(next(model.parameters()).dtype)
            self.teacher.place(sample["target"].device, dtype)
        batch = self._batch(sample)
        terms = self._plain_terms(model, batch) if projection is None else self._lean_terms(model, projection, batch)

        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": terms.loss.detach(),
            "nll_loss": terms.nll.sum(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if self.distilled_weight > 0:
            logging_output["kd_loss"] = terms.cross_entropy.sum()
            logging_output["kd_kl"] = terms.kl.sum()
            logging_output["kd_selected"] = terms.chosen.counts[0]
            logging_output["kd_tokens"] = batch.count
            logging_output.update(self._selection_sums(terms.chosen, batch))
            if self._watch is not None:
                self._watch.add(batch.tally[self.selector.workers.rank], terms.chosen.counts[1:])
        if self.report_accuracy:
            logging_output["n_correct"] = terms.correct.sum()
            logging_output["total"] = batch.count
        return terms.loss, sample_size, logging_output

    def _say_if_all_is_ignored(self, width: int) -> None:
        """Of the first batch of targets, as wide as that, that trains nothing."""
        if width <= self.ignore_prefix_size and "ignored" not in self._said:
            self._said.add("ignored")
            logger.warning(
                "--ignore-prefix-size %d: no token of a batch is left, its longest target has %d with eos; nothing is "
                "learned from such a batch, give a smaller number",
                *(self.ignore_prefix_size, width),
            )

    def _say_if_far(self, shares: Dict[str, float]) -> None:
        """Of each pool once: what was selected is far from ``--kd-rate``, and what would help."""
        if self.selector.workers.rank > 0:  # each has a sample of the tokens, and one is enough
            return
        rate, is_shared = self.selector.rate, self.selector.window == "shared"
        fewer = "the gates are of losses of an earlier, worse student; a smaller --kd-queue-size helps"
        if self.languages and not is_shared:
            fewer += ", or --kd-queue-window shared"
        more = "the losses are rising, or the queue is too small to tell; a larger --kd-queue-size helps"
        for few_or_many, is_one, reason in (("fewer", rate.__gt__, fewer), ("more", rate.__lt__, more)):
            found = ", ".join(f"{pool} {share:.2f}" for pool, share in shares.items() if is_one(share))
            if found:
                logger.warning(
                    "--kd-rate %g, but over the last %d updates far %s tokens were selected: %s (shares); %s",
                    *(rate, UPDATES, few_or_many, found, reason),
                )

    def _plain_terms(self, model, batch: "_Batch") -> "_Terms":
        """The loss as it is defined: all log-probabilities at once."""
        net_output = model(**batch.sample["net_input"])
        log_probs = batch.positions.take(model.get_normalized_probs(net_output, log_probs=True)).float()  # n x V
        target = batch.target
        smoothed, nll = label_smoothed_nll(log_probs, target, self.eps)
        chosen = self._select(nll.detach(), batch)
        if batch.is_dummy:
            teacher_probs = log_probs.new_empty(0, log_probs.size(1))
        else:
            selected = torch.zeros_like(batch.real).masked_scatter(batch.real, chosen.mask)
            teacher_probs = self.teacher.probs(batch.sample, Positions(selected), self.temperature)
        distilled = distillation_term(log_probs[chosen.mask], teacher_probs, self.temperature)
        loss = self.distilled_weight * distilled.cross_entropy.sum()
        if self.golden_weight > 0:
            loss = loss + self.golden_weight * smoothed.sum()
        correct = log_probs.argmax(1) == target
        return _Terms(loss, nll.detach(), distilled.cross_entropy.detach(), distilled.kl, correct, chosen)

    def _lean_terms(self, model, projection: Projection, batch: "_Batch") -> "_Terms":
        """The same from the features, by chunks of tokens."""
        # The teacher is first, so that what its pass needs and the student's activations, which are kept for the
        # backward pass, are not in memory together.
        is_distilled = self.distilled_weight > 0
        is_asked = is_distilled and not batch.is_dummy  # of another worker's batch nothing is selected
        teacher = self.teacher.output(batch.sample, batch.positions) if is_asked else []
        features, _ = model(**batch.sample["net_input"], features_only=True)
        student, target = projection(batch.positions.take(features)), batch.target  # n x d, n
        chosen, selected, count = None, torch.zeros_like(target, dtype=torch.bool), 0
        if is_distilled:
            # Only gates need to know the losses before the tokens are selected: one matrix product beside the loss's
            # three. With the golden gradient made in that pass, and that of the selected rows in another, it would be
            # 3 + 3 x rate: more, but for rates under a third.
            gated = self.selector.needs_rate
            nll = chunked_nll(student, target) if gated else torch.zeros_like(target, dtype=torch.float32)
            chosen = self._select(nll, batch)
            selected, count = chosen.mask, chosen.counts[0]
            if is_asked and count < batch.count:
                teacher = of_tokens(teacher, true_first(selected)[:count])
        weights = Weights(self.golden_weight, self.distilled_weight, self.eps, self.temperature)
        loss = chunked_loss(student, target, selected, teacher, weights, count=count)
        return _Terms(*loss, chosen)

    def _find_projection(self, model) -> Optional[Projection]:
        """Of the model that is there: from Python it can be another one, or have another output layer, each time."""
        try:
            return find_projection(model)
        except NoProjectionError as error:
            if str(error) not in self._said:
                self._said.add(str(error))
                logger.warning("the loss is computed in its plain formulation, which takes more memory: %s", error)
            return None

    def _batch(self, sample) -> "_Batch":
        real = sample["target"].ne(self.padding_idx)
        real[:, : self.ignore_prefix_size] = False
        if self.languages is None:
            language = torch.zeros_like(sample["target"][:, 0])
        else:
            language = self.languages.of_batch(sample)
        return _Batch(sample, real, language, self.selector)

    def _select(self, nll, batch: "_Batch") -> _Chosen:
        pools = len(self.selector.pools)
        # the other workers wait for the tokens of a dummy batch's: it has none
        real = slice(0, 0) if batch.is_dummy else slice(None)
        language = batch.language[real]
        selection = self.selector.select(nll[real], language, batch.tally)
        if batch.is_dummy:
            return _Chosen(torch.zeros_like(nll, dtype=torch.bool), selection.gates, [0] * (1 + pools))
        if not self.selector.needs_rate:
            return _Chosen(selection.mask, selection.gates, [batch.count, batch.count])
        of_pools = torch.zeros(pools, dtype=torch.long, device=nll.device).scatter_add_(
            0, language, selection.mask.long()
        )
        counts = Fetched(torch.cat([of_pools.sum().unsqueeze(0), of_pools])).wait()
        return _Chosen(selection.mask, selection.gates, counts)

    def _selection_sums(self, chosen: _Chosen, batch: "_Batch") -> Dict[str, Union[int, torch.Tensor]]:
        """Each pool's gate and whether there was one; for languages also their tokens and the selected ones."""
        names = [f"_{pool}" for pool in self.selector.pools] if self.languages else [""]
        sums: Dict[str, Union[int, torch.Tensor]] = {}
        tally = batch.tally
        for i in range(len(chosen.gates)):
            has_gate = int(any(counts[i] for counts in tally))
            sums[f"kd_gates{names[i]}"] = has_gate
            # a tensor in any case: fairseq adds up what is one, and what is none, of all workers apart
            sums[f"kd_gate{names[i]}"] = chosen.gates[i] if has_gate else torch.zeros_like(chosen.gates[i])
        if self.languages:
            own = tally[self.selector.workers.rank]
            for i, name in enumerate(names):
                sums[f"kd_tokens{name}"], sums[f"kd_selected{name}"] = own[i], chosen.counts[1 + i]
        return sums

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict]) -> None:
        """Log the sums of :meth:`forward`: losses and gates in bits a token, selections as shares."""
        keys = {key for log in logging_outputs for key in log}
        sums = _as_numbers({key: sum(log.get(key, 0) for log in logging_outputs) for key in sorted(keys)})
        super().reduce_metrics([sums])
        for key in ("kd_loss", "kd_kl"):
            if key in sums:
                _log_mean(key, sums[key] / math.log(2), sums["kd_selected"])
        for key, total in sums.items():
            if key.startswith("kd_tokens"):
                share = "kd_selected" + key[len("kd_tokens") :]
                _log_mean(share, sums[share], total)
            elif key.startswith("kd_gates"):
                gate = "kd_gate" + key[len("kd_gates") :]
                _log_mean(gate, sums[gate] / math.log(2), total)


def _as_numbers(sums: Dict) -> Dict[str, float]:
    """What is a tensor, fetched together: fairseq would wait for the device once for each that it logs."""
    tensors = [key for key, value in sums.items() if torch.is_tensor(value)]
    found = torch.stack([sums[key].double() for key in tensors]).tolist() if tensors else []
    return {**sums, **dict(zip(tensors, found))}


def _log_mean(key: str, total, count: float) -> None:
    if count > 0:
        metrics.log_scalar(key, total / count, count, round=3)


def _check_flags(strategy, alpha, rate, queue_size, window, temperature, task) -> None:
    if window not in WINDOWS:
        raise ConfigError(f"--kd-queue-window {window}: unknown; one of {', '.join(WINDOWS)}")
    kind = selector_class(strategy, window)
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--alpha {alpha}: out of range; a number from 0 to 1")
    check_temperature(temperature)
    if kind.needs_rate and rate is None:
        raise ConfigError(f"--kd-rate is missing: --kd-strategy {strategy} needs it; a number in (0, 1]")
    if rate is not None and not 0 < rate <= 1:
        raise ConfigError(f"--kd-rate {rate}: out of range; a number in (0, 1]")
    if kind.needs_queue and queue_size is None:
        raise ConfigError(f"--kd-queue-size is missing: --kd-strategy {strategy} needs it, in tokens")
    if queue_size is not None and queue_size <= 0:
        raise ConfigError(f"--kd-queue-size {queue_size}: out of range; a number of tokens over 0")
    tag, tags, side = task.cfg.kd_language_tag, task.cfg.kd_language_tags, task.cfg.kd_language_side
    has_languages = kind.by_language or task.names_teachers_by_language
    unused = [
        ("--alpha", alpha, alpha != 0.5 and not kind.uses_alpha),
        ("--kd-rate", rate, rate is not None and not kind.needs_rate),
        ("--kd-queue-size", queue_size, queue_size is not None and not kind.needs_queue),
        ("--kd-queue-window", window, window != kind.window),
        ("--kd-language-tag", tag, tag != "__src__" and not has_languages),
        ("--kd-language-tags", tags, tags is not None and not has_languages),
        ("--kd-language-side", side, side != "source" and not has_languages),
    ]
    for flag, value, is_unused in unused:
        if is_unused:
            logger.warning("%s %s has no effect with --kd-strategy %s", flag, value, strategy)
    if kind.uses_alpha and alpha == 0 and task.trains:
        given = [flag for flag in given_flags(task.cfg) if flag.startswith("--teacher")]
        given += [f"--kd-temperature {temperature}"] if temperature != 1 else []
        if given:
            logger.warning("no effect with --alpha 0, by which nothing is distilled: %s", ", ".join(given))


def check_temperature(temperature: float) -> None:
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise ConfigError(f"--kd-temperature {temperature}: out of range; a number from {low} to {high}")


def _check_memory(queue_size: int, queues: int, token_bytes: int) -> None:
    """See that full queues fit into the memory of this machine, or of its GPU, if that has more."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        there = max(there, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    needed = token_bytes * queue_size * queues
    if needed > there:
        raise ConfigError(
            f"--kd-queue-size {queue_size}: too large: {queues} queue{'s' * (queues > 1)} of it, {token_bytes} bytes a "
            f"token, are {needed:,} bytes, and there are {there:,}; at most {there // (token_bytes * queues):,} tokens"
        )


def _data_parallel_group():
    """The workers' process group; None where there is one worker."""
    if distributed_utils.get_data_parallel_world_size() == 1:
        return None
    return distributed_utils.get_data_parallel_group()

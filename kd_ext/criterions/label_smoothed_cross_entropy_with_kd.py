"""Batch in, loss and metrics out: label-smoothed cross-entropy with a distillation term."""

import logging
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Dict, List, NamedTuple, Optional

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
from kd_ext.modules.collectives import all_gather_concat
from kd_ext.modules.distillation_loss import distillation_term, label_smoothed_nll
from kd_ext.modules.language_tags import LanguageTags
from kd_ext.modules.token_selection import STRATEGIES, Selection, TokenSelector
from kd_ext.tasks.translation_with_kd import CRITERION, TranslationWithKDTask

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
    kd_temperature: float = field(
        default=1.0,
        metadata={"help": "temperature T of both softmaxes of the distillation term, which is multiplied by T^2"},
    )


class _Batch(NamedTuple):
    """The real tokens of a batch, ``n`` of them: no padding, none of the ignored prefix.

    Attributes:
        sample: what they are of; its ``net_input`` are the arguments of the models' forward
        real: where they are, shape ``(B, T)``, bool
        target: shape ``(n,)``, int64
        language: the pool of each one's sentence, shape ``(n,)``, int64
        is_dummy: the batch is another worker's
    """

    sample: Dict
    real: torch.Tensor
    target: torch.Tensor
    language: torch.Tensor
    is_dummy: bool

    def positions(self, selection: Selection):
        """Where the selected tokens are, shape ``(B, T)``, bool."""
        return torch.zeros_like(self.real).masked_scatter(self.real, selection.mask)


class _Terms(NamedTuple):
    """As :class:`~kd_ext.modules.chunked_loss.ChunkedLoss`, and what was selected."""

    loss: torch.Tensor
    nll: torch.Tensor
    cross_entropy: torch.Tensor
    kl: torch.Tensor
    correct: torch.Tensor
    selection: Selection


_UNKNOWN = object()


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
        kd_temperature=1.0,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        if not isinstance(task, TranslationWithKDTask):
            name = getattr(task.cfg, "_name", None) or type(task).__name__
            raise ConfigError(f"--criterion {CRITERION} works with --task translation_with_kd, not with --task {name}")
        if ignore_prefix_size < 0:
            raise ConfigError(f"--ignore-prefix-size {ignore_prefix_size}: negative; a number of tokens, or 0 for none")
        strategy = task.cfg.kd_strategy
        _check_flags(strategy, alpha, kd_rate, kd_queue_size, kd_temperature)
        self.temperature = kd_temperature
        self.languages = _find_languages(task) if STRATEGIES[strategy].by_language else None
        self.selector: TokenSelector = STRATEGIES[strategy](
            rate=kd_rate,
            capacity=kd_queue_size,
            pools=self.languages.pools if self.languages else ["all"],
            gather=partial(all_gather_concat, group=_data_parallel_group()),
        )
        self.golden_weight, self.distilled_weight = self.selector.weights(alpha)
        self.teacher = task.load_teacher(kd_temperature) if self.distilled_weight > 0 else None
        task.selector = self.selector
        self._projection = _UNKNOWN  # the student's, None where it has none: it is found in the first batch
        logger.info(
            "--kd-strategy %s: loss = %g label-smoothed + %g distillation; rate %s, queue %s, temperature %g",
            *(strategy, self.golden_weight, self.distilled_weight, kd_rate, kd_queue_size, kd_temperature),
        )

    def train(self, mode=True):
        # The trainer calls this at the start of every update. Pushes that are not committed by now belong to an
        # update that was skipped: overflow, out of memory.
        self.selector.rollback()
        return super().train(mode)

    def forward(self, model, sample, reduce=True):
        """The loss of one batch, as fairseq's criterions return it.

        Returns:
            the loss (scalar, float32, nats, summed), the sample size, and the sums to log
        """
        if not model.training:
            return super().forward(model, sample, reduce)
        if self._projection is _UNKNOWN:
            self._projection = _find_projection(model)
        if self.distilled_weight == 0 and self._projection is None:
            return super().forward(model, sample, reduce)
        if self.distilled_weight > 0:
            if self.teacher is None:
                raise RuntimeError("a model that was loaded to be used cannot be trained: its teacher was not loaded")
            self.teacher.place(sample["target"].device, next(model.parameters()).dtype)
        batch = self._batch(sample)
        terms = self._plain_terms(model, batch) if self._projection is None else self._lean_terms(model, batch)

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
            logging_output["kd_selected"] = terms.selection.mask.sum()
            logging_output["kd_tokens"] = batch.real.sum()
            logging_output.update(self._selection_sums(terms.selection, batch.language))
        if self.report_accuracy:
            logging_output["n_correct"] = terms.correct.sum()
            logging_output["total"] = batch.real.sum()
        return terms.loss, sample_size, logging_output

    def _plain_terms(self, model, batch: "_Batch") -> "_Terms":
        """The loss as it is defined: all log-probabilities at once."""
        net_output = model(**batch.sample["net_input"])
        log_probs = model.get_normalized_probs(net_output, log_probs=True)[batch.real].float()  # n x V
        smoothed, nll = label_smoothed_nll(log_probs, batch.target, self.eps)
        selection = self._select(nll.detach(), batch)
        if batch.is_dummy:
            teacher_probs = log_probs.new_empty(0, log_probs.size(1))
        else:
            teacher_probs = self.teacher.probs(batch.sample, batch.positions(selection), self.temperature)
        distilled = distillation_term(log_probs[selection.mask], teacher_probs, self.temperature)
        loss = self.distilled_weight * distilled.cross_entropy.sum()
        if self.golden_weight > 0:
            loss = loss + self.golden_weight * smoothed.sum()
        correct = log_probs.argmax(1) == batch.target
        return _Terms(loss, nll.detach(), distilled.cross_entropy.detach(), distilled.kl, correct, selection)

    def _lean_terms(self, model, batch: "_Batch") -> "_Terms":
        """The same from the features, by chunks of tokens."""
        # The teacher is first, so that what its pass needs and the student's activations, which are kept for the
        # backward pass, are not in memory together.
        is_distilled = self.distilled_weight > 0
        is_asked = is_distilled and not batch.is_dummy  # of another worker's batch nothing is selected
        teacher = self.teacher.output(batch.sample, batch.real) if is_asked else []
        features, _ = model(**batch.sample["net_input"], features_only=True)
        student = self._projection(features[batch.real])  # n x d
        if is_distilled:
            # Only gates need to know the losses before the tokens are selected: one matrix product beside the loss's
            # three. With the golden gradient made in that pass, and that of the selected rows in another, it would be
            # 3 + 3 x rate: more, but for rates under a third.
            gated = self.selector.needs_rate
            nll = chunked_nll(student, batch.target) if gated else batch.target.new_zeros(len(batch.target)).float()
            selection = self._select(nll, batch)
            if not selection.mask.all():
                teacher = of_tokens(teacher, selection.mask)
        else:
            selection = Selection(torch.zeros_like(batch.target, dtype=torch.bool), torch.empty(0))
        weights = Weights(self.golden_weight, self.distilled_weight, self.eps, self.temperature)
        loss = chunked_loss(student, batch.target, selection.mask, teacher, weights)
        return _Terms(*loss, selection)

    def _batch(self, sample) -> "_Batch":
        real = sample["target"].ne(self.padding_idx)
        real[:, : self.ignore_prefix_size] = False
        if self.languages is None:
            language = torch.zeros_like(sample["target"][real])
        else:
            sentences = self.languages.of_sentences(sample["net_input"]["src_tokens"])  # B
            language = sentences.unsqueeze(1).expand_as(real)[real]
        is_dummy = sample.get("is_dummy", False)
        return _Batch(sample, real, sample["target"][real], language, is_dummy)

    def _select(self, nll, batch: "_Batch") -> Selection:
        if not batch.is_dummy:
            return self.selector.select(nll, batch.language)
        # The other workers wait for this one's tokens: it has none.
        gates = self.selector.select(nll[:0], batch.language[:0]).gates
        return Selection(torch.zeros_like(nll, dtype=torch.bool), gates)

    def _selection_sums(self, selection: Selection, language) -> Dict[str, torch.Tensor]:
        """Each pool's gate and whether there was one; for languages also their tokens and the selected ones."""
        names = [f"_{pool}" for pool in self.selector.pools] if self.languages else [""]
        sums = {}
        for name, gate in zip(names, selection.gates):
            sums[f"kd_gate{name}"], sums[f"kd_gates{name}"] = gate.nan_to_num(), (~gate.isnan()).long()
        if self.languages:
            tokens = language.bincount(minlength=len(names))
            selected = language[selection.mask].bincount(minlength=len(names))
            for i, name in enumerate(names):
                sums[f"kd_tokens{name}"], sums[f"kd_selected{name}"] = tokens[i], selected[i]
        return sums

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict]) -> None:
        """Log the sums of :meth:`forward`: losses and gates in bits a token, selections as shares."""
        super().reduce_metrics(logging_outputs)
        keys = {key for log in logging_outputs for key in log if key.startswith("kd_")}
        sums = {key: float(sum(log.get(key, 0) for log in logging_outputs)) for key in sorted(keys)}
        if sums.get("kd_selected", 0) > 0:
            for key in ("kd_loss", "kd_kl"):
                _log_mean(key, sums[key] / math.log(2), sums["kd_selected"])
        for key, total in sums.items():
            if key.startswith("kd_tokens"):
                share = "kd_selected" + key[len("kd_tokens") :]
                _log_mean(share, sums[share], total)
            elif key.startswith("kd_gates"):
                gate = "kd_gate" + key[len("kd_gates") :]
                _log_mean(gate, sums[gate] / math.log(2), total)


def _log_mean(key: str, total: float, count: float) -> None:
    if count > 0:
        metrics.log_scalar(key, total / count, count, round=3)


def _check_flags(strategy, alpha, rate, queue_size, temperature) -> None:
    kind = STRATEGIES[strategy]
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
    unused = [
        ("--alpha", alpha, alpha != 0.5 and not kind.uses_alpha),
        ("--kd-rate", rate, rate is not None and not kind.needs_rate),
        ("--kd-queue-size", queue_size, queue_size is not None and not kind.needs_queue),
    ]
    for flag, value, is_unused in unused:
        if is_unused:
            logger.warning("%s %s has no effect with --kd-strategy %s", flag, value, strategy)


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ConfigError(f"--kd-temperature {temperature}: out of range; a number over 0")


def _find_languages(task) -> LanguageTags:
    languages = LanguageTags(task.source_dictionary.symbols, task.cfg.kd_language_tag)
    if len(languages) == 0:
        raise ConfigError(
            f"--kd-language-tag {task.cfg.kd_language_tag}: no word of the source dictionary begins with it; "
            "begin each source sentence with such a tag (__src__hi __tgt__en), or name the prefix that yours have"
        )
    logger.info("languages with a queue: %s", ", ".join(languages.pools[:-1]))
    return languages


def _find_projection(model) -> Optional[Projection]:
    try:
        return find_projection(model)
    except NoProjectionError as error:
        logger.warning("the loss is computed in its plain formulation, which takes more memory: %s", error)
        return None


def _data_parallel_group():
    """The workers' process group; None where there is one worker."""
    if distributed_utils.get_data_parallel_world_size() == 1:
        return None
    return distributed_utils.get_data_parallel_group()

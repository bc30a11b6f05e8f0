"""What would end a run at its first validation, after an epoch of training, is an error before the first update."""

import functools
import logging
from typing import Any, Iterator

import numpy as np
from fairseq import checkpoint_utils, utils
from fairseq.data import LanguagePairDataset
from fairseq.tasks.translation import TranslationTask

from kd_ext.errors import ConfigError

logger = logging.getLogger(__name__)

# the criterions of which it is known what they log in validation
_CRITERIONS = ("cross_entropy", "label_smoothed_cross_entropy", "label_smoothed_cross_entropy_with_kd")
_SCORES = ("loss", "nll_loss", "ppl")
_HIGHER_IS_BETTER = ("bleu", "accuracy")


def apply() -> None:
    """Look at ``--best-checkpoint-metric``, and at which sets are there and how long sentences (fairseq 0.12.2).

    Of a score that nothing logs fairseq ends with a KeyError where it is to be compared, and of a sentence longer than
    the model's positions, or than a batch, with an error where the batches are made: before a checkpoint is written.
    So it does of other sets than ``valid`` with ``--combine-valid-subsets``, which loads that one alone.
    """
    original = checkpoint_utils.load_checkpoint
    if getattr(original, "_kd_ext_looks", False):
        return

    @functools.wraps(original)
    def load_checkpoint(cfg, trainer, **kwargs):
        if isinstance(getattr(trainer, "task", None), TranslationTask) and not trainer.cfg.dataset.disable_validation:
            _check_combined(trainer.cfg.dataset)
            _check_metric(trainer)
            _check_lengths(trainer)
        return original(cfg, trainer, **kwargs)

    load_checkpoint._kd_ext_looks = True
    checkpoint_utils.load_checkpoint = load_checkpoint


def _check_combined(cfg: Any) -> None:
    others = set(cfg.valid_subset.split(",")) - {"valid", cfg.train_subset}
    if cfg.combine_valid_subsets and others:
        raise ConfigError(
            f"--valid-subset {cfg.valid_subset}: --combine-valid-subsets makes one set, valid, of valid, valid1, ..., "
            f"and then there is no {sorted(others)[0]}; leave one of the two flags out"
        )


def _check_metric(trainer: Any) -> None:
    cfg = trainer.cfg.checkpoint
    metric, flag = cfg.best_checkpoint_metric, "--best-checkpoint-metric"
    logs_more = type(trainer.task).reduce_metrics is not TranslationTask.reduce_metrics
    if logs_more or getattr(trainer.cfg.criterion, "_name", None) not in _CRITERIONS:
        return
    logged = [*_SCORES, *(["bleu"] if trainer.task.cfg.eval_bleu else [])]
    logged += ["accuracy"] if getattr(trainer.cfg.criterion, "report_accuracy", False) else []
    if metric == "bleu" and "bleu" not in logged:
        raise ConfigError(f"{flag} bleu: nothing is translated in validation; add --eval-bleu")
    if metric not in logged:
        raise ConfigError(f"{flag} {metric}: validation has no such score; one of {', '.join(logged)}")
    if (metric in _HIGHER_IS_BETTER) != cfg.maximize_best_checkpoint_metric:
        best, change = ("highest", "add") if metric in _HIGHER_IS_BETTER else ("lowest", "leave out")
        logger.warning(
            "%s %s: the best is the %s, and will be taken for the worst; %s --maximize-best-checkpoint-metric",
            *(flag, metric, best, change),
        )


def _check_lengths(trainer: Any) -> None:
    cfg, skips = trainer.cfg.dataset, "--skip-invalid-size-inputs-valid-test"
    most = utils.resolve_max_positions(trainer.task.max_positions(), trainer.get_model().max_positions())
    for name, dataset in _validation_sets(trainer):
        kept, ignored = dataset.filter_indices_by_size(np.arange(len(dataset)), most)
        if len(ignored) > 0 and (len(kept) == 0 or not cfg.skip_invalid_size_inputs_valid_test):
            longest = max(dataset.size(i) for i in ignored)
            remedy = f"add {skips} to leave them out, or raise" if len(kept) > 0 else "raise"
            raise ConfigError(
                f"--valid-subset {name}: {len(ignored)} of its {len(dataset)} sentences, up to {longest[0]} and "
                f"{longest[1]} tokens, are longer than the model's positions {most}; {remedy} --max-source-positions "
                "and --max-target-positions"
            )
        many = dataset.num_tokens_vec if isinstance(dataset, LanguagePairDataset) else np.vectorize(dataset.num_tokens)
        longest = int(many(kept).max()) if len(kept) > 0 else 0
        if 0 < (cfg.max_tokens_valid or 0) < longest:
            raise ConfigError(
                f"--max-tokens-valid {cfg.max_tokens_valid}: a sentence of --valid-subset {name} has {longest} tokens, "
                f"and a batch holds one at least; give {longest} or more (it is --max-tokens where it is not given)"
            )


def _validation_sets(trainer: Any) -> Iterator[Any]:
    for name in trainer.cfg.dataset.valid_subset.split(","):
        dataset = trainer.task.datasets.get(name)
        if hasattr(dataset, "filter_indices_by_size"):
            yield name, dataset

"""``--run-sanity-validation-steps``: validate once before the first update."""

import contextlib
import functools
import logging

from fairseq import checkpoint_utils
from fairseq.dataclass.configs import OptimizationConfig
from fairseq.logging import progress_bar

from kd_ext.modules.random_state import random_state_kept
from kd_ext.upstream.added_flags import add_switch

logger = logging.getLogger(__name__)


OPTION = "run_sanity_validation_steps"


def apply() -> None:
    """Add the option to fairseq-train, and the pass to what it does (fairseq 0.12.2).

    Options that are in no dataclass are lost before training starts. This one is in the group of the optimization
    options, the one group that training alone has. The pass comes right after a checkpoint was or was not
    loaded: the trainer, its task and all validation data are there, and no update has been made.

    Hydra has closed the groups before a plugin is loaded, and takes the option at the root of its configuration.
    """
    if OPTION in OptimizationConfig.__dataclass_fields__:
        return
    text = "one full pass over each validation subset before the first update; changes nothing else"
    add_switch(OptimizationConfig, OPTION, text)
    original = checkpoint_utils.load_checkpoint

    @functools.wraps(original)
    def load_checkpoint(cfg, trainer, **kwargs):
        extra_state, epoch_itr = original(cfg, trainer, **kwargs)
        # load_checkpoint itself takes any trainer, and a mock has every option
        cfg = getattr(trainer, "cfg", None)
        if True in (getattr(getattr(cfg, "optimization", None), OPTION, False), getattr(cfg, OPTION, False)):
            _validate(trainer, epoch_itr)
        return extra_state, epoch_itr

    checkpoint_utils.load_checkpoint = load_checkpoint


def _validate(trainer, epoch_itr) -> None:
    from fairseq_cli.train import validate  # not at the top: importing it sets up logging

    dataset = trainer.cfg.dataset
    logger.info("--run-sanity-validation-steps: validating before the first update")
    dummy_batch, max_steps = trainer._dummy_batch, dataset.max_valid_steps
    dataset.max_valid_steps = None
    try:
        with random_state_kept(), _reported_as_sanity():
            validate(trainer.cfg, trainer, trainer.task, epoch_itr, dataset.valid_subset.split(","))
    finally:
        # a validation batch in place of a training batch would change what a worker without data draws
        trainer._dummy_batch, dataset.max_valid_steps = dummy_batch, max_steps


@contextlib.contextmanager
def _reported_as_sanity():
    """Have ``validate`` report each subset as ``sanity_<subset>``, in the log and to every logging service."""
    original = progress_bar.progress_bar

    def sanity_progress_bar(*args, prefix="", **kwargs):
        bar = original(*args, prefix=f"sanity check: {prefix}", **kwargs)
        report = bar.print

        def report_as_sanity(stats, tag=None, step=None):
            report(stats, tag=f"sanity_{tag}", step=step)

        bar.print = report_as_sanity
        return bar

    progress_bar.progress_bar = sanity_progress_bar
    try:
        yield
    finally:
        progress_bar.progress_bar = original

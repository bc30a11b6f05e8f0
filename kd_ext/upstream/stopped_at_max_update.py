"""A run that has had its ``--max-update`` updates makes no more of them when it is started again."""

import functools
import logging
import math

from fairseq import checkpoint_utils

logger = logging.getLogger(__name__)


class _NoMoreEpochs:
    """In place of the iterator of epochs: fairseq trains while the number of the next one is <= ``--max-epoch``."""

    next_epoch_idx = math.nan


def apply() -> None:
    """Look at ``--max-update`` before the first update, too (fairseq 0.12.2).

    fairseq looks only after an update: the command of a run that has ended, or was killed between its last checkpoint
    and its exit, makes one update more each time it is given, and saves it over the result.
    """
    original = checkpoint_utils.load_checkpoint
    if getattr(original, "_kd_ext_stops", False):
        return

    @functools.wraps(original)
    def load_checkpoint(cfg, trainer, **kwargs):
        extra_state, epoch_itr = original(cfg, trainer, **kwargs)
        done, most = trainer.get_num_updates(), trainer.cfg.optimization.max_update or math.inf
        if done >= most:
            logger.info("the checkpoint has had %d updates, --max-update is %d: nothing is left to train", done, most)
            epoch_itr = _NoMoreEpochs()
        return extra_state, epoch_itr

    load_checkpoint._kd_ext_stops = True
    checkpoint_utils.load_checkpoint = load_checkpoint

"""A run that has ended makes no more updates when it is started again."""

import functools
import logging
import math
from typing import Any, Optional

from fairseq import checkpoint_utils

from kd_ext.upstream.patience import counter

logger = logging.getLogger(__name__)


class _NoMoreEpochs:
    """In place of the iterator of epochs: fairseq trains while the number of the next one is <= ``--max-epoch``."""

    next_epoch_idx = math.nan


def apply() -> None:
    """Look at ``--max-update``, ``--patience`` and ``--stop-time-hours`` before the first update, too (fairseq 0.12.2).

    fairseq looks only after an update: the command of a run that has ended, or was killed between its last checkpoint
    and its exit, trains on each time it is given, and saves that over the result.
    """
    original = checkpoint_utils.load_checkpoint
    if getattr(original, "_kd_ext_stops", False):
        return

    @functools.wraps(original)
    def load_checkpoint(cfg, trainer, **kwargs):
        extra_state, epoch_itr = original(cfg, trainer, **kwargs)
        reason = _why_ended(trainer)
        if reason is not None:
            logger.warning("%s: nothing is left to train; raise it, or begin anew in another --save-dir", reason)
            epoch_itr = _NoMoreEpochs()
        return extra_state, epoch_itr

    load_checkpoint._kd_ext_stops = True
    checkpoint_utils.load_checkpoint = load_checkpoint


def _why_ended(trainer: Any) -> Optional[str]:
    max_update = _setting(trainer, "optimization", "max_update")
    hours = _setting(trainer, "optimization", "stop_time_hours")
    patience, waited = _setting(trainer, "checkpoint", "patience"), getattr(counter(), "num_runs", 0)
    done = trainer.get_num_updates() if max(max_update, hours) > 0 else 0
    if 0 < max_update <= done:
        return f"--max-update {max_update}: the checkpoint has had {done} updates"
    # of a checkpoint that another run begins with fairseq takes over the time, too
    if done > 0 and 0 < hours < trainer._previous_training_time / 3600:
        return f"--stop-time-hours {hours}: the checkpoint was trained for longer"
    if 0 < patience <= waited:
        return f"--patience {patience}: the checkpoint has had {waited} validations without a better score"
    return None


def _setting(trainer: Any, group: str, name: str) -> float:
    """The number; 0, no limit, where a trainer is not fairseq's: ``load_checkpoint`` itself takes any."""
    value = getattr(getattr(getattr(trainer, "cfg", None), group, None), name, 0)
    return value if isinstance(value, (int, float)) else 0

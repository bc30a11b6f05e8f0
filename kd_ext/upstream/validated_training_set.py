"""``--valid-subset train,valid``: a run that also validates on what it trains on."""

import copy
import functools
from typing import Any

from fairseq.trainer import Trainer


def apply() -> None:
    """Validate on a copy of the training set (fairseq 0.12.2).

    fairseq keeps the batches of a data set, and the epoch that they are in, by the data set: so each validation would
    take an epoch from the training, or end the one under way, and a resumed run be in another.
    """
    original = Trainer.get_valid_iterator
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def get_valid_iterator(self, subset, *args, **kwargs):
        if subset == self.cfg.dataset.train_subset:
            subset = _copied(self.task, subset)
        return original(self, subset, *args, **kwargs)

    get_valid_iterator._kd_ext = True
    Trainer.get_valid_iterator = get_valid_iterator


def _copied(task: Any, subset: str) -> str:
    """Have a copy of a set beside it, which is another to whoever tells them apart; its name."""
    dataset, name = task.dataset(subset), f"{subset}, to validate on"
    if getattr(task, "_kd_ext_copied", None) is not dataset:  # data in parts: another one each epoch
        task._kd_ext_copied, task.datasets[name] = dataset, copy.copy(dataset)
    return name

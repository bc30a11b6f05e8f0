"""``--patience`` counts on when a run is resumed."""

import functools
import os
import sys
from types import SimpleNamespace
from typing import Any

from fairseq.trainer import Trainer

KEY = "patience"
COUNTS = ("best", "num_runs")


def apply() -> None:
    """Keep what ``--patience`` has counted in checkpoints (fairseq 0.12.2).

    fairseq counts in attributes of a function, and forgets: a run that is resumed trains longer than one that was not
    stopped. The counts are restored, and dropped, with the best score, which fairseq does keep; those of another run,
    whose checkpoint was named or that went before in this process, are no concern of this one.
    """
    saving, loading = Trainer.save_checkpoint, Trainer.load_checkpoint
    if getattr(saving, "_kd_ext", False):
        return

    @functools.wraps(saving)
    def save_checkpoint(self, filename, extra_state):
        counting = counter()
        counted = {name: getattr(counting, name) for name in COUNTS if hasattr(counting, name)}
        return saving(self, filename, {**extra_state, KEY: counted})

    @functools.wraps(loading)
    def load_checkpoint(
        self,
        filename,
        reset_optimizer=False,
        reset_lr_scheduler=False,
        optimizer_overrides=None,
        reset_meters=False,
    ):
        for name in COUNTS:
            vars(counter()).pop(name, None)
        extra_state = loading(self, filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters)
        folders = os.path.dirname(filename), self.cfg.checkpoint.save_dir
        is_own = len(set(map(os.path.realpath, folders))) == 1
        if extra_state is not None and is_own and not reset_optimizer and not reset_meters:
            for name, value in extra_state.get(KEY, {}).items():
                setattr(counter(), name, value)
        return extra_state

    save_checkpoint._kd_ext = True
    Trainer.save_checkpoint, Trainer.load_checkpoint = save_checkpoint, load_checkpoint


def counter() -> Any:
    """The function that counts: that of ``python -m fairseq_cli.train``, or that of all other commands."""
    modules = map(sys.modules.get, ("__main__", "fairseq_cli.train"))
    nowhere = SimpleNamespace()  # a program of the user's need have neither
    return next((module.should_stop_early for module in modules if hasattr(module, "should_stop_early")), nowhere)

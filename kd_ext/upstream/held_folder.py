"""A run's folder is its own: one run at a time writes there, and nothing that it reads lies where it writes."""

import functools
import os
import re
import sys
from typing import Any, List, Optional

from fairseq import checkpoint_utils, utils
from fairseq.distributed.utils import is_master
from fairseq.file_io import PathManager

from kd_ext.errors import ConfigError
from kd_ext.files.folder_lock import hold

_WRITTEN = re.compile(r"checkpoint.*\.pt|crash\.pt")


def apply() -> None:
    """Take ``--save-dir`` before anything is loaded or written (fairseq 0.12.2).

    fairseq knows of no other run: a second start with the same folder removes what the first is writing, or writes
    over it. Of several workers the one takes it that writes. A run with ``--no-save`` does not, and may share it.

    ``add_defaults`` is the first that fairseq's training calls with its whole configuration; where that was imported
    after this plugin, the folder is taken before a checkpoint is looked for.
    """
    training = sys.modules.get("fairseq_cli.train")
    if training is not None and not getattr(training.add_defaults, "_kd_ext", False):
        training.add_defaults = _holding(training.add_defaults)  # type: ignore[attr-defined]
    original = checkpoint_utils.load_checkpoint
    if getattr(original, "_kd_ext_holds", False):
        return

    @functools.wraps(original)
    def load_checkpoint(cfg, trainer, **kwargs):
        if getattr(trainer, "data_parallel_rank", None) == 0 and not cfg.no_save:  # fairseq itself takes any trainer
            _hold(cfg.save_dir)
        return original(cfg, trainer, **kwargs)

    load_checkpoint._kd_ext_holds = True
    checkpoint_utils.load_checkpoint = load_checkpoint


def _holding(original: Any) -> Any:
    @functools.wraps(original)
    def add_defaults(cfg):
        original(cfg)
        if is_master(cfg.distributed_training) and not cfg.checkpoint.no_save:
            _check_inputs(cfg)
            _hold(cfg.checkpoint.save_dir)

    add_defaults._kd_ext = True  # type: ignore[attr-defined]
    return add_defaults


def _hold(folder: str) -> None:
    if PathManager.supports_rename(folder):  # else on no file system
        os.makedirs(folder, exist_ok=True)
        hold(folder, "--save-dir")


def _check_inputs(cfg: Any) -> None:
    """See that no teacher, and no checkpoint to begin with, is under a name that the run writes."""
    folder = cfg.checkpoint.save_dir
    read = {"--teacher-checkpoint-path": _teachers(getattr(cfg.task, "teacher_checkpoint_path", None))}
    if not os.path.exists(os.path.join(folder, "checkpoint_last.pt")):  # else it begins with that one
        read["--finetune-from-model"] = utils.split_paths(cfg.checkpoint.finetune_from_model or "")
    for flag, paths in read.items():
        for path in paths:
            is_beside = os.path.realpath(os.path.dirname(path) or ".") == os.path.realpath(folder)
            if is_beside and _WRITTEN.fullmatch(os.path.basename(path)) and os.path.isfile(path):
                raise ConfigError(f"{flag} {path}: the run would write over it; name another --save-dir than {folder}")


def _teachers(value: Optional[str]) -> List[str]:
    """The paths in ``--teacher-checkpoint-path``; of teachers by language all that can be read out of it.

    A language may have a '=' as well, and which ones there are is not known yet.
    """
    from kd_ext.teachers import assignment  # not at the top: models register themselves after every touch

    entries = assignment._entries(value) if value else None
    if entries is None:
        return utils.split_paths(value or "")
    named = [entry[place.end() :].strip() for entry in entries for place in re.finditer("=", entry)]
    return [path for paths in named for path in utils.split_paths(paths)]

"""A run's folder is its own: one run at a time writes there, and nothing that it reads lies where it writes."""

import functools
import os
import re
import sys
from typing import Any, Callable, Dict, List

from fairseq import checkpoint_utils, utils
from fairseq.dataclass.initialize import add_defaults
from fairseq.distributed.utils import is_master
from fairseq.file_io import PathManager

from kd_ext.errors import ConfigError
from kd_ext.files.folder_lock import hold
from kd_ext.files.writing import make_folder
from kd_ext.parsing import typed_flags

_WRITTEN = re.compile(r"checkpoint.*\.pt|crash\.pt")
_DATA = re.compile(r"dict\..*\.txt|.*\.(bin|idx)|\w+\.([^.-]+)-([^.]+)\.(\2|\3)")  # of a folder of data
_IS_LOG = re.compile("log[-_]file")
_INPUTS: Dict[str, Callable[[Any], List[str]]] = {}


def list_inputs(flag: str, paths: Callable[[Any], List[str]]) -> None:
    """Keep what a run reads by a flag of its task from being written over.

    Args:
        flag: for the message
        paths: of the files, by the settings of whatever task the run has
    """
    _INPUTS[flag] = paths


def apply() -> None:
    """Take ``--save-dir`` before anything is loaded or written (fairseq 0.12.2).

    fairseq knows of no other run: a second start with the same folder removes what the first is writing, or writes
    over it. Of several workers the one takes it that writes. A run with ``--no-save`` does not, and may share it.

    ``add_defaults`` is the first that fairseq's training calls with its whole configuration; where that was imported
    after this plugin, or is a program of the user's, the folder is taken before a checkpoint is looked for.
    """
    for training in map(sys.modules.get, ("__main__", "fairseq_cli.train")):  # the former by python -m, or as a file
        if getattr(training, "add_defaults", None) is add_defaults:
            training.add_defaults = _holding_add_defaults  # type: ignore[union-attr]
    original = checkpoint_utils.load_checkpoint
    if getattr(original, "_kd_ext_holds", False):
        return

    @functools.wraps(original)
    def load_checkpoint(cfg, trainer, **kwargs):
        if getattr(trainer, "data_parallel_rank", None) == 0 and not cfg.no_save:  # fairseq itself takes any trainer
            _check_inputs(trainer.cfg)
            _hold(cfg.save_dir)
        return original(cfg, trainer, **kwargs)

    load_checkpoint._kd_ext_holds = True
    checkpoint_utils.load_checkpoint = load_checkpoint


def _holding_add_defaults(cfg: Any) -> None:
    add_defaults(cfg)
    _check_log(cfg)
    if is_master(cfg.distributed_training) and not cfg.checkpoint.no_save:
        _check_inputs(cfg)
        _hold(cfg.checkpoint.save_dir)


def _hold(folder: str) -> None:
    if PathManager.supports_rename(folder):  # else on no file system
        make_folder(folder, "--save-dir")
        hold(folder, "--save-dir")


def _check_inputs(cfg: Any) -> None:
    """See that no teacher, and no checkpoint to begin with, is under a name that the run writes."""
    folder, restored = cfg.checkpoint.save_dir, cfg.checkpoint.restore_file
    own = os.path.join(folder, "checkpoint_last.pt")
    read = {flag: paths(cfg.task) for flag, paths in _INPUTS.items()}
    if not os.path.exists(own):  # else it begins with that one
        read["--finetune-from-model"] = utils.split_paths(cfg.checkpoint.finetune_from_model or "")
    # a run goes on in its own folder from any file there, and begins anew there from its last one alone
    is_last = restored == "checkpoint_last.pt" or os.path.abspath(restored) == os.path.abspath(own)
    if cfg.checkpoint.reset_optimizer and not is_last:
        read["--restore-file"] = [restored]
    written = _written(folder)
    for flag, paths in read.items():
        for path in paths:
            name = written.get(os.path.realpath(path)) if os.path.isfile(path) else None
            if name is not None:
                raise ConfigError(
                    f"{flag} {path}: the run would write over it, as {os.path.join(folder, name)}; name another "
                    f"--save-dir than {folder}"
                )


def _check_log(cfg: Any) -> None:
    """See that the log, which is appended to a file that is there, is not to go to one that is read, or a checkpoint.

    Raises:
        ConfigError: it is
    """
    log = cfg.common.log_file
    if log is None or not os.path.isfile(log):
        return
    real = os.path.realpath(log)
    folders = map(os.path.realpath, utils.split_paths(getattr(cfg.task, "data", None) or ""))
    others = (value for flag, value in typed_flags() if not _IS_LOG.search(flag + value))
    typed = [part for value in others for part in re.split("[=:,]", value)]
    read = [*typed, *(path for paths in _INPUTS.values() for path in paths(cfg.task))]
    is_data = os.path.dirname(real) in folders and _DATA.fullmatch(os.path.basename(real))
    if log.endswith(".pt") or is_data or real in map(os.path.realpath, read):
        raise ConfigError(f"--log-file {log}: the log would be appended to that file, which is no log; name another")


def _written(folder: str) -> Dict[str, str]:
    """Of the files that a run in `folder` replaces the names there: what a link points to is written as well."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return {os.path.realpath(os.path.join(folder, name)): name for name in names if _WRITTEN.fullmatch(name)}

"""Saving that can be interrupted at any moment: a checkpoint is the old one or the new one, whole."""

import functools
import glob
import logging
import os
import shutil
import stat

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from kd_ext.errors import ConfigError
from kd_ext.files.writing import PART, written_whole

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # as upstream: a network file system may refuse once


def apply() -> None:
    """Write checkpoints and their copies beside their names, then rename them (fairseq 0.12.2).

    fairseq writes a new file so, but copies it onto ``checkpoint_last.pt`` in place: a run that is killed there, or
    whose disk is full, has lost the file that it would resume from. Its three attempts at writing go into one file,
    one behind the other, and a full disk ends in two tracebacks.

    What a killed run has left of such a file is removed when the next one starts. Files elsewhere than on a mounted
    file system, and asynchronous writing, are left to fairseq.
    """
    if getattr(checkpoint_utils.torch_persistent_save, "_kd_ext", False):
        return
    checkpoint_utils.torch_persistent_save = _saving_whole(checkpoint_utils.torch_persistent_save)
    PathManager.copy = staticmethod(_copying_whole(PathManager.copy))
    checkpoint_utils.load_checkpoint = _removing_parts(checkpoint_utils.load_checkpoint)


def _saving_whole(original):
    @functools.wraps(original)
    def torch_persistent_save(obj, filename, async_write=False):
        if async_write or not PathManager.supports_rename(filename):
            return original(obj, filename, async_write)
        for attempt in range(ATTEMPTS):
            try:
                with written_whole(filename) as file:
                    torch.save(obj, file)
                return None
            except ConfigError as error:
                if attempt == ATTEMPTS - 1:
                    raise _advice(error) from error

    torch_persistent_save._kd_ext = True
    return torch_persistent_save


def _copying_whole(original):
    @functools.wraps(original)
    def copy(src_path, dst_path, overwrite=False):
        is_device = os.path.exists(dst_path) and not os.path.isfile(dst_path)
        if not overwrite or is_device or not all(map(PathManager.supports_rename, (src_path, dst_path))):
            return original(src_path, dst_path, overwrite=overwrite)
        # copying in place writes to the file that a link points to, and keeps its permissions
        target = os.path.realpath(dst_path)
        try:
            with open(src_path, "rb") as source, written_whole(target) as file:
                shutil.copyfileobj(source, file, 1 << 20)
                if os.path.exists(target):
                    os.chmod(file.name, stat.S_IMODE(os.stat(target).st_mode))
        except ConfigError as error:
            raise _advice(error) from error
        return True

    return copy


def _advice(error):
    return ConfigError(
        f"{error}; the checkpoints saved before it are whole: make room or mend the folder, then give the same "
        "command again"
    )


def _removing_parts(original):
    @functools.wraps(original)
    def load_checkpoint(cfg, trainer, **kwargs):
        # Here no worker can have begun to save: without rank 0 none can make an update. A run that saves nothing may
        # share its folder with one that does.
        if getattr(trainer, "data_parallel_rank", None) == 0 and not cfg.no_save:
            for name in ("checkpoint*.pt", "crash.pt"):
                for part in glob.glob(os.path.join(glob.escape(cfg.save_dir), name + PART)):
                    logger.info("removed %s: a run was killed while it saved", part)
                    os.unlink(part)
        return original(cfg, trainer, **kwargs)

    return load_checkpoint

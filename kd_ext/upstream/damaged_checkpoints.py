"""A checkpoint that cannot be read is an error of one line, for every command."""

import functools
import glob
import os
from typing import Optional

from fairseq import checkpoint_utils

from kd_ext.errors import ConfigError
from kd_ext.files.reading import explained
from kd_ext.files.safe_loading import load

EXPECTED = "checkpoint of fairseq"


def apply() -> None:
    """Say what is wrong with a checkpoint, and which one could be used (fairseq 0.12.2, every torch).

    fairseq passes on what ``torch.load`` raises: for a type that is not listed a page of advice to load the file
    unsafely, for damage any exception, and for a changed weight none at all.
    """
    original = checkpoint_utils.load_checkpoint_to_cpu
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        try:
            with explained(path, EXPECTED):
                return original(path, *args, **kwargs)
        except ConfigError as error:
            whole = _newest_whole_beside(path)
            advice = f"the newest whole one beside it is {whole}" if whole else "beside it is no whole one"
            raise ConfigError(f"{error}; {advice}") from error

    load_checkpoint_to_cpu._kd_ext = True
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


def _newest_whole_beside(damaged: str) -> Optional[str]:
    """The checkpoint in the same folder that was written last, of those that can be read."""
    paths = glob.glob(os.path.join(glob.escape(os.path.dirname(damaged)), "checkpoint*.pt"))
    others = [path for path in paths if os.path.isfile(path) and not os.path.samefile(path, damaged)]
    for path in sorted(others, key=os.path.getmtime, reverse=True):
        try:
            with explained(path, EXPECTED):
                load(path)
        except ConfigError:
            continue
        return path
    return None

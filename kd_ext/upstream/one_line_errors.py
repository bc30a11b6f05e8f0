"""A wrong flag ends the command with one line, not with a traceback."""

import sys
from typing import Optional

from kd_ext.errors import ConfigError


def apply() -> None:
    """Print an uncaught :class:`ConfigError` as a line; leave every other exception to who printed it before.

    Also one that was caught and raised as another: fairseq's trainer (0.12.2) turns whatever a model's
    ``load_state_dict`` raises into a plain ``Exception``.
    """
    previous = sys.excepthook
    if getattr(previous, "_kd_ext", False):
        return

    def excepthook(kind, error, traceback):
        mendable = _find(error)
        if mendable is not None:
            print(f"kd_ext: error: {mendable}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    excepthook._kd_ext = True
    sys.excepthook = excepthook


def _find(error: Optional[BaseException]) -> Optional[ConfigError]:
    """The :class:`ConfigError` that `error` is, or was raised from."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error

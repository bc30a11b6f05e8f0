"""A wrong flag ends the command with one line, not with a traceback."""

import sys

from kd_ext.errors import ConfigError


def apply() -> None:
    """Print an uncaught :class:`ConfigError` as a line; leave every other exception to who printed it before."""
    previous = sys.excepthook
    if getattr(previous, "_kd_ext", False):
        return

    def excepthook(kind, error, traceback):
        if issubclass(kind, ConfigError):
            print(f"kd_ext: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    excepthook._kd_ext = True
    sys.excepthook = excepthook

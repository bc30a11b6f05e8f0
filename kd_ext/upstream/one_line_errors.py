"""A wrong flag ends the command with one line, not with a traceback."""

import os
import re
import sys
from typing import Optional

from omegaconf.errors import MissingMandatoryValue
from torch.multiprocessing import ProcessRaisedException

from kd_ext.errors import ConfigError


def apply() -> None:
    """Print an uncaught :class:`ConfigError` as a line; leave every other exception to who printed it before.

    Also one that was caught and raised as another: fairseq's trainer (0.12.2) turns whatever a model's
    ``load_state_dict`` raises into a plain ``Exception``. Also a ``???`` of a recipe that was given no value.

    hydra-core 1.0 catches every error and reports it itself, without this hook up to Python 3.9, and from 3.10 on
    with a TypeError of its own (``print_exception`` has no ``etype`` there). Its own switch turns that off.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    previous = sys.excepthook
    if getattr(previous, "_kd_ext", False):
        return

    def excepthook(kind, error, traceback):
        mendable = _message(error)
        if mendable is not None:
            print(f"kd_ext: error: {mendable}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    excepthook._kd_ext = True
    sys.excepthook = excepthook


_DO_NOT_FIT = "Cannot load model parameters from checkpoint"  # how the trainer's Exception begins


def _message(error: Optional[BaseException]) -> Optional[str]:
    """The line for what `error` is, or was raised from; None if that is nothing that a flag can mend."""
    outermost = error
    while error is not None:
        if isinstance(error, ConfigError):
            return str(error)
        if isinstance(error, ProcessRaisedException):  # of a worker that fairseq started: its traceback is the text
            lines = re.findall(rf"^{ConfigError.__module__}\.{ConfigError.__name__}: (.*)", str(error), re.MULTILINE)
            return lines[-1] if lines else None  # the last was raised from those before
        if isinstance(error, MissingMandatoryValue):
            return f"{str(error).splitlines()[0]}; the recipe leaves it open (???): name it on the command line"
        error = error.__cause__ or error.__context__
    if outermost is not None and str(outermost).startswith(_DO_NOT_FIT):
        reason = outermost.__cause__ or outermost.__context__
        said = " ".join(str(reason).split())[:400]
        remedy = "give the flags of the model that it was trained with, or another checkpoint"
        return f"{outermost} ({type(reason).__name__}: {said}); {remedy}"
    return None

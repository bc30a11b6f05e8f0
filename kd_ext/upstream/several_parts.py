"""Training data of several files in one folder: ``train``, ``train1``, ..., and ``--combine-valid-subsets``."""

import functools
import glob
import inspect
import logging
import os

from fairseq.tasks import online_backtranslation, translation, translation_from_pretrained_bart, translation_lev

logger = logging.getLogger(__name__)

_NAME = "upsample_primary"


def apply() -> None:
    """Take the first part once where ``--upsample-primary`` says nothing (fairseq 0.12.2).

    Its default was 1, and is -1 now, by which the first part is repeated all the same: a ValueError of numpy's.
    """
    original = translation.load_langpair_dataset
    if getattr(original, "_kd_ext", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_langpair_dataset(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        if given.arguments[_NAME] == -1:
            given.arguments[_NAME] = 1
        elif given.arguments[_NAME] != 1:
            _warn_of_one_part(**given.arguments)
        return original(*given.args, **given.kwargs)

    load_langpair_dataset._kd_ext = True
    for module in (translation, translation_from_pretrained_bart, translation_lev, online_backtranslation):
        module.load_langpair_dataset = load_langpair_dataset


def _warn_of_one_part(data_path, split, combine, upsample_primary, **_) -> None:
    second = os.path.join(glob.escape(data_path), f"{glob.escape(split)}1.*")
    if combine and split == "train" and not glob.glob(second):
        logger.warning(
            "--upsample-primary %s: %s has no %s1, and the one %s is taken as it is",
            *(upsample_primary, data_path, split, split),
        )

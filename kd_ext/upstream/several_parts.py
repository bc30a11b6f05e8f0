"""Training data of several files in one folder: ``train``, ``train1``, ..., and ``--combine-valid-subsets``."""

import functools
import inspect

from fairseq.tasks import online_backtranslation, translation, translation_from_pretrained_bart, translation_lev

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
        return original(*given.args, **given.kwargs)

    load_langpair_dataset._kd_ext = True
    for module in (translation, translation_from_pretrained_bart, translation_lev, online_backtranslation):
        module.load_langpair_dataset = load_langpair_dataset

"""Training data of several files in one folder: ``train``, ``train1``, ..., and ``--combine-valid-subsets``."""

import functools

from fairseq.tasks import translation


def apply() -> None:
    """Take the first part once where ``--upsample-primary`` says nothing (fairseq 0.12.2).

    Its default was 1, and is -1 now, by which the first part is repeated all the same: a ValueError of numpy's.
    """
    original = translation.load_langpair_dataset
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def load_langpair_dataset(*args, upsample_primary=1, **kwargs):
        times = 1 if upsample_primary == -1 else upsample_primary
        return original(*args, upsample_primary=times, **kwargs)

    load_langpair_dataset._kd_ext = True
    translation.load_langpair_dataset = load_langpair_dataset

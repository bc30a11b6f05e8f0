"""A checkpoint that cannot be read is an error of one line, for every command."""

import functools

from fairseq import checkpoint_utils

from kd_ext.reading import explained


def apply() -> None:
    """Say what is wrong with a checkpoint (fairseq 0.12.2, every torch).

    fairseq passes on what ``torch.load`` raises: for a type that is not listed a page of advice to load the file
    unsafely, for damage any exception, and for a changed weight none at all.
    """
    original = checkpoint_utils.load_checkpoint_to_cpu
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        with explained(path, "checkpoint of fairseq"):
            return original(path, *args, **kwargs)

    load_checkpoint_to_cpu._kd_ext = True
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu

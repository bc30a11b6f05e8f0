"""Models with random weights, built as fairseq-train would."""

from argparse import Namespace

from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

import kd_ext  # noqa: F401  registers the architectures


def dictionary(size: int) -> Dictionary:
    words = Dictionary()
    for i in range(size - len(words)):
        words.add_symbol(f"w{i}")
    return words


def build(arch: str, words: Dictionary, **settings):
    """A model of a named architecture; `settings` are the flags, with underscores."""
    args = Namespace(**settings)
    ARCH_CONFIG_REGISTRY[arch](args)
    task = Namespace(source_dictionary=words, target_dictionary=words)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, task)

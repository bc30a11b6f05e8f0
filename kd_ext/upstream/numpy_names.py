"""Names that numpy has given up and fairseq still uses."""

import importlib
from types import ModuleType, SimpleNamespace

import numpy as np

# All of fairseq's modules that use such a name; found by going through each attribute of numpy in its source.
MODULES = (
    "fairseq.data.data_utils",  # percentile(interpolation=), for --num-batch-buckets, and int
    "fairseq.data.language_pair_dataset",  # compat, for --num-batch-buckets
    "fairseq.data.token_block_dataset",  # compat, for language models
    "fairseq.modules.dynamic_crf_layer",  # float
)


class _NumpyAsItWas(ModuleType):
    """numpy, and what it had before 1.24 and 2.0."""

    int, float = int, float
    compat = SimpleNamespace(long=int)

    @staticmethod
    def percentile(*args, interpolation=None, **kwargs):
        if interpolation is not None:
            kwargs["method"] = interpolation  # its name since numpy 1.22
        return np.percentile(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(np, name)


def apply() -> None:
    """Give the modules of fairseq that need it numpy's older names (fairseq 0.12.2 with numpy >= 1.24).

    numpy itself stays as it is. numpy 1.24 has no ``int`` and ``float`` any more, 2.0 no ``compat``, 2.4 no
    ``percentile(interpolation=)``.
    """
    if hasattr(np, "float") and hasattr(np, "compat"):
        return
    older = _NumpyAsItWas("numpy")
    for name in MODULES:
        module = importlib.import_module(name)
        if module.np is np:
            module.np = older

"""Which flag of this command a fault is of: teachers are loaded as in training, whose flags have other names."""

import contextlib
from typing import Dict, Iterator

from kd_ext.errors import ConfigError

TEACHER = {"--teacher-checkpoint-path": "--path", "--teacher-model-overrides": "--model-overrides"}
REVERSE = {"--teacher-checkpoint-path": "--rescore", "--teacher-model-overrides": "--rescore-model-overrides"}


@contextlib.contextmanager
def blamed(names: Dict[str, str]) -> Iterator[None]:
    """Let an error of what is run inside name this command's flags.

    Args:
        names: by those of training

    Raises:
        ConfigError: in place of one of other names
    """
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for of_training, own in names.items():
            text = text.replace(of_training, own)
        raise ConfigError(text) from error

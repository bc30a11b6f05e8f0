"""The arguments of commands: of this project's own, and what was typed of any."""

import argparse
import logging
import os
import sys
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Tuple

from kd_ext.errors import ConfigError

logger = logging.getLogger(__name__)

_ENSEMBLE = "joined by ':' they are an ensemble"
_SEVERAL = {  # flags that take several values in one
    **dict.fromkeys(("--teacher-checkpoint-path", "--path", "--rescore"), _ENSEMBLE),
    **dict.fromkeys(("--teacher-model-overrides", "--rescore-model-overrides"), "one dictionary has all"),
    "--kd-language-tags": "several are joined by ','",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument, where argparse prints its usage first.

    Args:
        description: a module's docstring, whose first line is shown; none with ``python -OO``
    """

    def __init__(self, description: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(description=(description or "").split("\n")[0], **kwargs)

    def parse_args(self, args: Optional[Sequence[str]] = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; each argument of these commands that is given has a value.

        Raises:
            ConfigError: as of :func:`check_path`
        """
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    check_path(name.upper(), text)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise it as a :class:`ConfigError`."""
        raise ConfigError(f"{message.replace('argument ', '', 1)}; {self.prog} --help lists what there is")


def check_path(flag: str, value: str) -> None:
    """See that a value names something, and as it is meant.

    Raises:
        ConfigError: it is empty, which is the current folder as a path, or begins with a ``~`` that no shell replaced
    """
    if not value:
        raise ConfigError(f"{flag} '': empty, as a shell's variable that is not set; give a value, or leave it out")
    if value.split(os.sep)[0] == "~":
        raise ConfigError(
            f"{flag} {value}: a shell puts your folder in place of ~ only where a word begins so, and not in quotes; "
            f"write {os.path.expanduser(value)}"
        )


def warn_of_repeated(words: Optional[Sequence[str]] = None) -> None:
    """Say of flags that take several values in one that of two the last alone counts, as argparse has it.

    Args:
        words: of the command line; None: of this process's
    """
    found: Dict[str, str] = {}
    for flag, value in typed_flags(words):
        if flag in _SEVERAL and found.get(flag, value) != value:
            logger.warning("%s %s: not used, as the last one counts, %s; %s", flag, found[flag], value, _SEVERAL[flag])
        found[flag] = value


def typed_flags(words: Optional[Sequence[str]] = None) -> List[Tuple[str, str]]:
    """Each flag of a command line with the value after it, in order; a switch has the next word.

    Args:
        words: None: of this process's
    """
    words, found = sys.argv[1:] if words is None else words, []
    for word, after in zip(words, [*words[1:], ""]):
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            found.append((flag, value if equals else after))
    return found

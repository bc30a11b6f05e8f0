"""The arguments of commands: of this project's own, and what was typed of any."""

import argparse
import sys
from typing import Any, List, NoReturn, Optional, Tuple

from kd_ext.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument, where argparse prints its usage first.

    Args:
        description: a module's docstring, whose first line is shown; none with ``python -OO``
    """

    def __init__(self, description: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(description=(description or "").split("\n")[0], **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise it as a :class:`ConfigError`."""
        raise ConfigError(f"{message.replace('argument ', '', 1)}; {self.prog} --help lists what there is")


def typed_flags() -> List[Tuple[str, str]]:
    """Each flag of this process's command line with the value after it, in order; a switch has the next word."""
    words, found = sys.argv[1:], []
    for word, after in zip(words, [*words[1:], ""]):
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            found.append((flag, value if equals else after))
    return found

"""The arguments of commands: of this project's own, and what was typed of any."""

import argparse
import sys
from typing import List, NoReturn, Tuple

from kd_ext.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument, where argparse prints its usage first."""

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
